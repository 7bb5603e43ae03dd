"""What the process of one row does: it runs cases in order and writes a record after each.

Where it dies, the parent knows from the records in which case that was. A fault on a GPU is an exception that leaves
the context useless: then it asks for another process.
"""

import time
import traceback
from collections.abc import Sequence

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.code import code_of
from kvarena.experiments.gpu_validation.folder import Folder
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


def main(step: Step, cases: Sequence[str], context: Context) -> int:
    """Run the cases. Returns the exit status."""
    for case in cases:
        record = ended(step, case, context)
        Folder(context.folder).add(record)
        if record.result is Result.FAULTED or (record.result is Result.FAILED and not _context_works(context.device)):
            return START_ANOTHER
    return 0


def ended(step: Step, case: str, context: Context) -> Record:
    """Run one case; whatever happens is its record."""
    start = time.perf_counter()
    result, reason, values = _outcome(step, case, context)
    seconds, origin = round(time.perf_counter() - start, 2), Folder(context.folder).origin()
    return Record(step.name, case, result, reason, values, seconds, now(), origin, code_of(step, case))


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
    except Exception:  # of any kind: the next process finds out
        return False
    return True
