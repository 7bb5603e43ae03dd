"""`./run.sh gpu-validation`: the command line. It needs no Hydra."""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation import matrix
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.plan import STEPS, step_named
from kvarena.experiments.gpu_validation.record import BAD, Record
from kvarena.experiments.gpu_validation.session import Session
from kvarena.experiments.gpu_validation.step import Step

ALL_PASSED, SOMETHING_BAD, USER_ERROR, NO_GPU = 0, 1, 2, 4

_EPILOG = """\
exit status: 0 nothing failed, 1 something failed, faulted or timed out, 2 a mistake of yours, 4 there is no GPU.
A second run over the same folder runs what has not passed yet."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments say, and leave with the status."""
    try:
        sys.exit(_run(_parser().parse_args(arguments)))
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
    parser.add_argument("--only", action="append", metavar="STEP", help="run this step; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the steps and their cases")
    parser.add_argument("--budget-s", type=float, default=480.0, metavar="S", help="of the whole session (480)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, with CPU kernels and host driver"
    )
    parser.add_argument("--docs", action="store_true", help="rewrite docs/gpu.md from results/*/gpu_validation/")
    return parser


def _run(given: argparse.Namespace) -> int:
    if given.docs:
        matrix.write_docs()
        return ALL_PASSED
    steps = [STEPS[0], *map(step_named, given.only)] if given.only else list(STEPS)
    steps = list(dict.fromkeys(steps))
    if given.list:
        for step in steps:
            print(f"{step.name} (at most {step.limit_s:g} s): {step.about}")
            print("".join(f"    {case}\n" for case in step.cases(given.device)), end="")
        return ALL_PASSED
    if given.out is None:
        raise UserError("gpu-validation: --out DIR says where the results go")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out}: that is a file")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {given.out}: the folder cannot be made: {error.strerror}") from error
    return _status(_validated(Folder(given.out.resolve()), steps, given), given.device)


def _validated(folder: Folder, steps: Sequence[Step], given: argparse.Namespace) -> list[Record]:
    """Run the steps. Where the folder takes no more, the experiments' runs that are not in it yet are left outside."""
    with tempfile.TemporaryDirectory(prefix="kvarena-validation-", ignore_cleanup_errors=True) as scratch:
        try:
            folder.unpack(Path(scratch))
            return Session(folder, given.device, Path(scratch), given.budget_s).run(steps)
        except UserError as error:
            runs = Path(scratch, "runs")
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
