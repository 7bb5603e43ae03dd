"""`./run.sh report` writes the scorecard; `./run.sh claim=ID` runs what one claim needs, and judges it."""

from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import RESULTS
from kvarena.harness.record.writing import write_whole
from kvarena.harness.scorecard.markdown import markdown
from kvarena.harness.scorecard.page import page
from kvarena.harness.scorecard.scorecard import make_scorecard

FILES = ("report.html", "SCORECARD.md")


def write_report(results: Path = RESULTS) -> list[Path]:
    """Judge every claim from the kept runs and write both files. Raises UserError where that cannot be done."""
    card = make_scorecard(results)
    paths = [results / name for name in FILES]
    for path, content in zip(paths, (page(card), markdown(card)), strict=True):
        try:
            write_whole(path, content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    counts = ", ".join(f"{count} {verdict}" for verdict, count in card.counts.items())
    print(f"{len(card.findings)} claims, {len(card.runs)} kept runs: {counts}")
    print("\n".join(f"report:  {path}" for path in paths))
    return paths
