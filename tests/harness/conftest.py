"""Helpers of these tests that are no tests: `two_clocks` and `by_hand` are imported by their names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
