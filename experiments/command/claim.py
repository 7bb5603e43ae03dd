"""What one claim needs: the experiment that its expression names, with only the figures and systems it asks for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.harness.config import load, names
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import read_published
from kvarena.harness.scorecard import text
from kvarena.harness.scorecard.claims import ARITHMETIC, Claim
from kvarena.harness.scorecard.expression import Point, points_of
from kvarena.harness.scorecard.judge import Finding, judge
from kvarena.harness.scorecard.kept_runs import KeptRun, Published, load_run


def has_gpu() -> bool:
    """Whether anything can be measured on a GPU here."""
    import torch

    return torch.cuda.is_available()


def arguments_for(claim: Claim, on_gpu: Callable[[], bool] = has_gpu) -> list[str]:
    """The command line that yields what the claim asks for; empty for arithmetic.

    Raises UserError where a GPU is needed and nothing on this machine stands in, or where the experiment is missing.
    """
    if claim.experiment == ARITHMETIC:
        return []
    experiment, expression, clock = claim.experiment, claim.expression, claim.clock
    if claim.needs_gpu and not on_gpu():
        if claim.stand_in is None:
            raise UserError(f"claim={claim.id}: is measured on a GPU, there is none here, and nothing stands in for it")
        (experiment, expression), clock = claim.stand_in, "measured"
    if experiment not in names("experiment"):
        raise UserError(f"claim={claim.id}: needs the experiment {experiment}, which this version does not have")
    asked = clock == "measured" or (clock == "modelled" and "modelled" in load("experiment", experiment).profiles)
    chosen = [f"experiment={experiment}", *([f"clock={clock}"] if asked else [])]
    return [*chosen, *_narrowed(experiment, points_of(expression))]


def _narrowed(experiment: str, points: list[Point]) -> Iterator[str]:
    """Overrides that leave out what the points do not need, where their names say so."""
    figures = dict.fromkeys(point.figure for point in points)
    if "only" in get_type_hints(registry.get(experiment).Params):
        yield f"params.only=[{','.join(figures)}]"
    config = load("experiment", experiment)
    needed = {_file_of(config, point) for point in points}
    systems = list(config.get("systems") or [])
    if needed <= set(systems):
        yield f"systems=[{','.join(name for name in systems if name in needed)}]"


def _file_of(config: DictConfig, point: Point) -> str | None:
    """The system that stands for a point's system, as the experiment states; None where none does."""
    figure = (config.get("published") or {}).get(point.figure) or {}
    file: str | None = (figure.get("systems") or {}).get(point.system)
    return file


def judged(claim: Claim, folder: Path | None) -> Finding:
    """The claim, judged from one finished run alone; None: from no run."""
    runs: list[KeptRun] = [] if folder is None else [load_run(folder)]
    return judge(claim, runs, Published(read_published(PUBLISHED)))


def print_verdict(finding: Finding) -> None:
    """The claim and its verdict, a line each."""
    claim = finding.claim
    here = "-" if finding.answer is None else text.value_of(finding.answer, claim.unit)
    deviation = f" ({finding.deviation})" if finding.deviation else ""
    print(f"\n{claim.id}: {claim.text} ({text.PAPERS[claim.paper]}, {claim.section})")
    print(f"published: {text.published(claim)}")
    print(f"here:      {here}{deviation}")
    print(f"verdict:   {finding.verdict} ({claim.rule})")
    print(f"evidence:  {text.evidence_of(finding)}" + (f"; {claim.note}" if claim.note else ""))
