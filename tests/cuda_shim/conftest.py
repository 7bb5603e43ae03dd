"""What tests over the shim share; its helpers are imported by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def unwatched() -> Iterator[None]:
    """Nobody notes which statements run: interpreting a kernel takes long enough."""
    watching = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(watching)
