"""`./run.sh report` writes the scorecard; `./run.sh claim=ID` runs what one claim needs, and judges it."""

import os
import tempfile
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import RESULTS
from kvarena.harness.scorecard.markdown import markdown
from kvarena.harness.scorecard.page import page
from kvarena.harness.scorecard.scorecard import make_scorecard

FILES = ("report.html", "SCORECARD.md")


def write_report(results: Path = RESULTS) -> list[Path]:
    """Judge every claim from the kept runs and write both files. Raises UserError where that cannot be done."""
    card = make_scorecard(results)
    paths = [results / name for name in FILES]
    for path, content in zip(paths, (page(card), markdown(card)), strict=True):
        _replace(path, content)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in card.counts.items())
    print(f"{len(card.findings)} claims, {len(card.runs)} kept runs: {counts}")
    print("\n".join(f"report:  {path}" for path in paths))
    return paths


def _replace(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
