import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.harness.paths import ROOT


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Finds a file of the data folder beside the checkout (or in KVARENA_SHARED); skips where it is absent."""
    folder = Path(os.environ.get("KVARENA_SHARED", ROOT.parent / "shared"))

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{folder / name} is absent: real traces are not part of the project")
        return folder / name

    return find
