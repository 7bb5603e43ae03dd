"""The process of one step: `python -m kvarena.experiments.gpu_validation.child STEP DEVICE FOLDER SCRATCH CASE...`.

It runs the cases in order and writes a record after each. Where it dies, the parent knows from the records in which
case that was. A fault on a GPU is an exception that leaves the context useless: then it asks for another process.
"""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.plan import step_named
from kvarena.experiments.gpu_validation.record import (
    FailedError,
    NotRunError,
    Record,
    Result,
    Values,
    fault_behind,
    now,
)
from kvarena.experiments.gpu_validation.step import Context, Step

START_ANOTHER = 64  # exit status: the last case is recorded, the rest needs a fresh process


def main(arguments: Sequence[str]) -> int:
    """Run the cases. Returns the exit status."""
    name, device, folder, scratch, *cases = arguments
    step, context = step_named(name), Context(device, Path(folder), Path(scratch))
    for case in cases:
        record = ended(step, case, context)
        Folder(context.folder).add(record)
        if record.result is Result.FAULTED or (record.result is Result.FAILED and not _context_works(device)):
            return START_ANOTHER
    return 0


def ended(step: Step, case: str, context: Context) -> Record:
    """Run one case; whatever happens is its record."""
    start = time.perf_counter()
    result, reason, values = _outcome(step, case, context)
    origin = Folder(context.folder).origin()
    return Record(step.name, case, result, reason, values, round(time.perf_counter() - start, 2), now(), origin)


def _outcome(step: Step, case: str, context: Context) -> tuple[Result, str, Values]:
    try:
        return Result.PASSED, "", step.run(case, context)
    except (NotRunError, UserError) as error:
        return Result.NOT_RUN, str(error), {}
    except ModuleNotFoundError as error:
        return Result.NOT_RUN, f"needs {error.name}, not installed", {}
    except FailedError as error:
        return Result.FAILED, str(error), {}
    except Exception as error:
        if type(error).__name__ == "MissingJITCacheError":  # FlashInfer's, where FLASHINFER_DISABLE_JIT is set
            return Result.NOT_RUN, "its kernels were not built beforehand, and are not compiled here", {}
        traceback.print_exc()
        if fault := fault_behind(error):
            return Result.FAULTED, fault, {}
        return Result.FAILED, f"{type(error).__name__}: {error}".split("\n")[0], {}


def _context_works(device: str) -> bool:
    """Whether the GPU still answers this process."""
    if device != "cuda":
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # tensors over addresses must not be taken down in an order of the interpreter's choice
