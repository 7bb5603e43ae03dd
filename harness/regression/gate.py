"""The gate's command line: `./run.sh regression [--tier 1|2|3] [--base REV] [--json FILE] [--accept REASON]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.regression import exact, export, gpu, report, timed
from kvarena.harness.regression.replays import run_all
from kvarena.harness.regression.revision import base_revision
from kvarena.harness.regression.verdict import Outcome, Status, overall

_EPILOG = """\
Leaves with 0: nothing got worse; 1: something did; 2: it cannot be judged (missing, not a number, another machine).
Without --tier all three run, and where tier 2 has no base, or tier 3 no GPU, the others decide."""


def main(arguments: Sequence[str]) -> Status:
    """Run the gate. Returns its exit status; raises UserError for what the user got wrong."""
    given = _parser().parse_args(arguments)
    if given.accept is not None:
        return _accept(given)
    base_revision(given.base)  # a name that does not exist is a mistake, to be heard of before anything runs
    tiers = [given.tier] if given.tier else [1, 2, 3]
    outcomes = [_run(tier, given.base) for tier in tiers]
    required = {given.tier, 1} | ({2} if given.base else set())
    status = overall([outcome.status(tier in required) for tier, outcome in zip(tiers, outcomes, strict=True)])
    report.publish(report.markdown(outcomes, status))
    if given.json:
        export.write(given.json, outcomes)
    return status


def _run(tier: int, base: str | None) -> Outcome:
    match tier:
        case 1:
            return exact.run(run_all())
        case 2:
            return timed.run(base)
        case _:
            return gpu.run()


def _accept(given: argparse.Namespace) -> Status:
    if given.tier == 2:
        raise UserError("--tier 2 --accept: times on a CPU have no baseline to accept, base and head run side by side")
    changes = gpu.accept(given.accept) if given.tier == 3 else exact.accept(run_all(), given.accept)
    if changes:
        print("\n".join(changes))
        print("accepted: commit results/baselines/ together with what caused it")
    else:
        print("no difference to the last baseline")
    return Status.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh regression",
        description="Says whether this tree costs more memory or time than the one before. docs/regression.md",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tier", type=int, choices=(1, 2, 3), help="1: counts, 2: CPU times, 3: GPU times")
    parser.add_argument("--base", metavar="REV", help="tier 2: the revision to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write FILE for github-action-benchmark")
    parser.add_argument("--accept", metavar="REASON", help="make this tree's counts the baseline (tier 3: its times)")
    return parser
