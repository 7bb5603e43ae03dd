"""A session of the validation on a GPU, rehearsed over the shim: `python rehearsal.py --out DIR --plan 1`.

The command, the session with its forked processes, the folder, the plans and the steps are those of a GPU's run, and
so are the driver, the stores and Triton's kernels (interpreted). Two things differ, both below: the steps' sizes, and
the parent's clock, which shows what the cases that have ended are assumed to have taken.

Run by `test_rehearsed_plans.py`.
"""

import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torch_on_shim
from torch_on_shim import SHIM

from kvarena.allocators.sizes import KB
from kvarena.experiments.gpu_validation import command, session
from kvarena.experiments.gpu_validation.plan import ALL, each_once
from kvarena.experiments.gpu_validation.record import Result, read
from kvarena.experiments.gpu_validation.steps import latencies
from kvarena.experiments.vattention import driver_calls
from kvarena.harness.measured import calibration
from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.threads import set_compute_threads

# 32 tokens in a page-group of 64 KB; half precision, since torch's own FlashAttention takes no other
SHAPES = (
    Shapes(heads=4, group=1, size=256, dtype=torch.float16, device="cuda"),
    Shapes(heads=1, group=2, size=16, dtype=torch.float16, device="cuda"),
)
POINT = (1, 200)  # batch and context
_HEADS = ["model.dtype=float16", "model.num_heads=2", "model.num_kv_heads=1", "model.head_size=16"]
_MODEL = ["model=tiny-llama", "model.num_heads=2", "model.num_kv_heads=1", "model.head_size=256"]  # 32 in 64 KB, sliced
_VATTENTION = "vattention/triton{page_group: 64KB, tensor_slicing: true}"

# step -> what of its module says how large things are on a GPU: a value, or a dictionary by device
SIZES: dict[str, dict[str, object]] = {
    "driver_contract": {"_FOLDER": "tests/allocators/vmm"},  # the shim's own test runs the rest
    "addresses": {"SHAPES": SHAPES, "PAGE_GROUP": 64 * KB, "SQUARE": 64},
    "edge": {"SHAPES": SHAPES[:1], "PAGE_GROUP": 64 * KB},
    "kernels": {"SHAPES": SHAPES[1:], "LONGEST": 20},
    "bandwidth": {"BYTES": 1 << 20, "SQUARE": 64},
    "sweep": {"_SHORT": [*_HEADS, "params.working_set_bytes=1", "params.rounds=1"], "point_of": lambda case: POINT},
    "decode": {
        "_SHORT": [*_MODEL, "model.num_layers=1", 'params.prompts=["4"]', "params.max_tokens=64",
                   "params.warmup_steps=1", "params.check_steps=1", "params.rounds=1", "params.steps_per_round=1",
                   "params.pool_bytes=134217728"],
    },
    "served": {
        "_SHORT": [*_MODEL, f"systems=[static-triton,paged-triton,{_VATTENTION}]", "trace.num_requests=3",
                   "trace.prompt_tokens=20", "trace.output_tokens=5", "trace.max_tokens=64"],
    },
    "replay": {"MEMORY": {"memory for all": 1.25, "short of memory": 0.4}},
    "overlap": {"_SHORT": [*_MODEL, f"systems=[{_VATTENTION}]", "params.prompt_tokens=27", "params.cohorts=2",
                           "params.stagger=1", "params.iterations=5", "params.max_batch=2", "params.rounds=1",
                           "params.max_tokens=64", "params.warmup_steps=1", "engine.cuda_graphs=true"],
                "LEAST_EVENTS": 2},
    "tiles": {"ROUNDS": 1, "GOAL": POINT, "MODEL": ["model=llama-3-8b", *_HEADS], "WORKING_SET_BYTES": 1},
    "copies": {"TENSORS": 1, "ROUNDS": 1},
    "prefill": {"_SHORT": [*_MODEL, "params.contexts=[40]", "params.rounds=2", "params.pool_bytes=16777216"]},
    "models": {"MODELS": ["tiny-llama", "tiny-opt"]},
}  # fmt: skip


class AssumedClock:
    """Stands still but for what the cases that have ended are assumed to take on a GPU."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "validation.jsonl"
        self._known = len(read(self._file))
        self._assumed = {(row.step.name, case): row.case_s for row, cases in each_once(ALL, "cuda") for case in cases}

    def monotonic(self) -> float:
        ended = [record for record in read(self._file)[self._known :] if record.result is not Result.NOT_RUN]
        return sum(self._assumed[record.key] for record in ended)

    def sleep(self, seconds: float) -> None:
        time.sleep(0.01)


def make_small() -> None:
    """Give the steps their sizes; every name must be there already."""
    for step, sizes in SIZES.items():
        module = import_module(f"kvarena.experiments.gpu_validation.steps.{step}")
        for name, value in sizes.items():
            before = getattr(module, name)
            by_device = isinstance(before, dict) and "cuda" in before
            setattr(module, name, before | {"cuda": value} if by_device else value)
    for overrides, _ in latencies._RUNS.values():
        overrides["cuda"] = overrides["cpu"]
    calibration.GPU_READ_BYTES, driver_calls.SIDE = 1 << 20, 64
    SHIM.sizes(granularity=64 * KB)


if __name__ == "__main__":
    torch_on_shim.pytest_configure()
    set_compute_threads(1)
    make_small()
    session.time = AssumedClock(Path(sys.argv[sys.argv.index("--out") + 1]))
    command.main()
