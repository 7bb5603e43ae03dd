"""Where things lie: the checkout's root and the folders under it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RESULTS = ROOT / "results"
PUBLISHED = RESULTS / "published"
