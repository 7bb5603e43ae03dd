"""What is here: written to environment.json, which every later record refers to."""

import shutil
import subprocess

from kvarena.allocators.vmm.drivers import granularity_of
from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.record import NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.registry import missing

_ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current,ecc.mode.current"


def cases(device: str) -> list[str]:
    """One."""
    return ["machine"]


def run(case: str, context: Context) -> Values:
    """Write environment.json. Raises NotRunError where a GPU was to be validated and there is none."""
    import torch

    folder, cuda = Folder(context.folder), torch.cuda.is_available()
    folder.write_environment({"cuda": cuda})  # first: what else is found here may take its time, or fail

    from kvarena.harness.record.code_state import git_state
    from kvarena.harness.record.provenance import libraries, machine

    kernels = {name: missing(spec) or "present" for name, (spec, *_) in CATALOGUE.items()}
    found = {
        "device": torch.cuda.get_device_name().lower().replace(" ", "-") if cuda and context.on_gpu else "cpu",
        "cuda": cuda,
        "git": git_state(),
        "libraries": libraries() | {"torch": torch.__version__},
        "machine": machine(),
        "nvidia_smi": _nvidia_smi(),
        "granularity_bytes": _granularity(context.device),
        "kernels": kernels,
    }
    folder.write_environment(found)
    if context.on_gpu and not cuda:
        raise NotRunError("no CUDA device")
    present = [name for name, state in kernels.items() if state == "present"]
    return {
        "device": found["device"],
        "torch": torch.__version__,
        "page-group granularity, bytes": found["granularity_bytes"],
        "kernels": " ".join(present),
    }


def _nvidia_smi() -> str | None:
    """What NVIDIA's tool says of the first GPU; None where there is no such tool, else why it said nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _granularity(device: str) -> int | str:
    try:
        return granularity_of(device)
    except UserError as error:
        return str(error)
