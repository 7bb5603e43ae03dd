"""Helpers of these tests that are no tests: `fake_cuda` is imported by its name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
