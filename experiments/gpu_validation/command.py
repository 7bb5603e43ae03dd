"""`./run.sh gpu-validation`: the command line. It needs no Hydra."""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation import matrix
from kvarena.experiments.gpu_validation.folder import LIMIT_BYTES, Folder
from kvarena.experiments.gpu_validation.kit import unpacked
from kvarena.experiments.gpu_validation.plan import ALL, ENVIRONMENT, ONE, PLANS, Planned, each_once
from kvarena.experiments.gpu_validation.record import BAD, Record
from kvarena.experiments.gpu_validation.session import Session, compile_once, preload
from kvarena.experiments.gpu_validation.step import step_named

ALL_PASSED, SOMETHING_BAD, USER_ERROR, NO_GPU = 0, 1, 2, 4

_EPILOG = """\
exit status: 0 nothing failed, 1 something failed, faulted or timed out, 2 a mistake of yours, 4 there is no GPU.
A second run over the same folder runs what has not passed yet under the code as it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments say, and leave with the status."""
    try:
        sys.exit(_run(_parser().parse_args(arguments)))
    except ModuleNotFoundError as error:
        print(f"error: gpu-validation needs {error.name}, not installed; --kit may bring it", file=sys.stderr)
        sys.exit(USER_ERROR)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh gpu-validation",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results: five flat files")
    parser.add_argument("--plan", type=int, choices=PLANS, help="1: what all else rests on; 2: what failed, the rest")
    parser.add_argument("--only", action="append", metavar="STEP", help="run this step; may be repeated")
    parser.add_argument("--case", action="append", metavar="CASE", help="run this case; may be repeated")
    parser.add_argument(
        "--list", action="store_true", help="print the cases, with the seconds they are assumed to take"
    )
    parser.add_argument("--budget-s", type=float, default=300.0, metavar="S", help="of the whole session (300)")
    parser.add_argument(
        "--max-mib", type=int, default=LIMIT_BYTES >> 20, metavar="N", help="of all that is written to DIR (16)"
    )
    parser.add_argument(
        "--kit", type=Path, metavar="KIT", help="what ./run.sh gpu-kit made: libraries that are not here"
    )
    parser.add_argument("--resume", type=Path, metavar="EARLIER", help="an earlier session's folder: go on from there")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, with CPU kernels and host driver"
    )
    parser.add_argument("--docs", action="store_true", help="rewrite docs/gpu.md from results/*/gpu_validation/")
    return parser


def _run(given: argparse.Namespace) -> int:
    begun = time.monotonic()  # importing the steps takes its time, too
    if given.docs:
        matrix.write_docs()
        return ALL_PASSED
    with tempfile.TemporaryDirectory(prefix="kvarena-validation-", ignore_cleanup_errors=True) as scratch:
        if given.kit is not None:
            unpacked(given.kit, Path(scratch))  # the steps import what it brings
        return _run_in(Path(scratch), given, begun)


def _run_in(scratch: Path, given: argparse.Namespace, begun: float) -> int:
    if given.list:
        for row, cases in _asked(given, []):
            print(f"{row.step.name}, {row.case_s:g} s each: {row.step.about}")
            print("".join(f"    {case}\n" for case in cases), end="")
        return ALL_PASSED
    if given.out is None:
        raise UserError("gpu-validation: --out DIR says where the results go")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out}: that is a file")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {given.out}: the folder cannot be made: {error.strerror}") from error
    folder = Folder(given.out.resolve(), given.max_mib << 20)
    if given.resume is not None:
        folder.take_over(given.resume)
    planned = _asked(given, folder.records())
    session = Session(folder, given.device, scratch, given.budget_s - (time.monotonic() - begun))
    return _status(_validated(session, folder, planned, scratch, given.device), given.device)


def _asked(given: argparse.Namespace, records: Sequence[Record]) -> list[Planned]:
    """What is to run, in order: the environment, then a plan's rows or all. Raises UserError for unknown names.

    Plan 2 begins with what plan 1 has a record of: only what has not passed is run.
    """
    keys = {record.key for record in records}
    steps = [ENVIRONMENT.step, *map(step_named, given.only)] if given.only else [row.step for row in ALL]
    planned = each_once(PLANS[given.plan] if given.plan else ALL, given.device)
    if given.plan == 2:
        tried = [(row, [c for c in cases if (row.step.name, c) in keys]) for row, cases in each_once(ONE, given.device)]
        planned = [planned[0], *tried, *planned[1:]]
    planned = [(row, cases) for row, cases in planned if row.step in steps]
    if given.case:
        known = [case for _, cases in planned for case in cases]
        if unknown := [case for case in given.case if case not in known]:
            raise UserError(f"--case {unknown[0]}: no such case here. There are: {'; '.join(known)}")
        planned = [
            (row, cases if row is ENVIRONMENT else [c for c in cases if c in given.case]) for row, cases in planned
        ]
    return [(row, cases) for row, cases in planned if cases]


def _validated(
    session: Session, folder: Folder, planned: Sequence[Planned], scratch: Path, device: str
) -> list[Record]:
    """Run the steps. Where the folder takes no more, the experiments' runs that are not in it yet are left outside."""
    try:
        folder.unpack(scratch)
        preload(planned)
        if device == "cuda":
            compile_once()
        return session.run(planned)
    except UserError as error:
        runs = scratch / "runs"
        if not runs.is_dir():
            raise
        left = shutil.move(runs, tempfile.mkdtemp(prefix="kvarena-validation-runs-"))
        raise UserError(f"{error} The experiments' runs so far are in {left}.") from error


def _status(records: Sequence[Record], device: str) -> int:
    counts = Counter(record.result for record in records)
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())) or "nothing was pending")
    if device == "cuda" and any(record.reason == "no CUDA device" for record in records):
        return NO_GPU
    return SOMETHING_BAD if any(record.result in BAD for record in records) else ALL_PASSED
