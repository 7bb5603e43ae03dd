"""All that is known: every claim judged, every published figure beside every kept run. Both pages are made of this."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kvarena.harness.paths import PUBLISHED, RESULTS
from kvarena.harness.record.summary import read_published
from kvarena.harness.scorecard.claims import load_claims
from kvarena.harness.scorecard.figures import Compared, compare, not_run
from kvarena.harness.scorecard.judge import Finding, Verdict, judge
from kvarena.harness.scorecard.kept_runs import KeptRun, Published, kept_runs


@dataclass(frozen=True)
class Scorecard:
    """Claims, runs and figures, judged."""

    findings: list[Finding]
    runs: list[KeptRun]
    compared: dict[str, list[Compared]]  # by the run's name
    figures_not_run: list[tuple[str, str]]  # (paper, figure)
    published: pd.DataFrame

    @property
    def counts(self) -> dict[Verdict, int]:
        """Claims by verdict, in the order of the verdicts."""
        counted = Counter(finding.verdict for finding in self.findings)
        return {verdict: counted[verdict] for verdict in Verdict}


def make_scorecard(results: Path = RESULTS, published_folder: Path = PUBLISHED) -> Scorecard:
    """Judge what is kept under `results`. Raises UserError for claims or runs that cannot be read."""
    table = read_published(published_folder)
    published, runs = Published(table), kept_runs(results)
    findings = [judge(claim, runs, published) for claim in load_claims(published_folder / "claims.csv")]
    compared = {run.name: compare(run, table) for run in runs}
    missing = not_run([c for several in compared.values() for c in several], table)
    return Scorecard(findings, runs, compared, missing, table)
