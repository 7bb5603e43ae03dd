"""Copies of scattered blocks, as copy-on-write and swapping make them: in one launch, and one after the other."""

import torch
from torch import Tensor

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.measured.timed_call import seconds
from kvarena.harness.record.statistics import median_interval

COPIES = 512
BLOCK_BYTES = 32 << 10  # 16 tokens of K in one layer of Llama-3-8B
TENSORS = {"cuda": 64, "cpu": 4}  # K and V of 32 layers
ROUNDS = 20


def cases(device: str) -> list[str]:
    """One."""
    return [f"{COPIES} blocks"]


def uses(case: str) -> list[str]:
    """The kernel that copies."""
    return ["kvarena.allocators.memory.triton_copies"]


def run(case: str, context: Context) -> Values:
    """Microseconds either way, in turns. Raises FailedError where a byte differs."""
    count, device = TENSORS[context.device], torch.device(context.device)
    pools = [torch.randint(256, (2 * COPIES, BLOCK_BYTES), dtype=torch.uint8, device=device) for _ in range(count)]
    order = torch.randperm(2 * COPIES, generator=torch.Generator().manual_seed(0)).tolist()
    sources, targets = order[:COPIES], order[COPIES:]
    wanted = [pool.clone() for pool in pools]
    runs, copy = Runs.of_blocks(sources, targets, BLOCK_BYTES), ByteCopies([p.data_ptr() for p in pools], device)
    copy(runs)
    one_by_one(wanted, sources, targets)
    if not all(torch.equal(pool, other) for pool, other in zip(pools, wanted, strict=True)):
        raise FailedError("other bytes were copied")
    at_once, alone = [], []
    for _ in range(ROUNDS):
        at_once.append(seconds(lambda: copy(runs), device))
        alone.append(seconds(lambda: one_by_one(pools, sources, targets), device))
    ratio = median_interval(torch.tensor(alone) / torch.tensor(at_once))
    bytes_moved = 2 * count * COPIES * BLOCK_BYTES
    return {
        "one by one / one launch": f"{ratio:.1f}",
        "one launch, us": round(1e6 * median_interval(at_once).median, 1),
        "one by one, us": round(1e6 * median_interval(alone).median, 1),
        "one launch, GB/s read and written": round(bytes_moved / median_interval(at_once).median / 1e9, 1),
    }


def one_by_one(pools: list[Tensor], sources: list[int], targets: list[int]) -> None:
    """As a loop over `cudaMemcpyAsync` does."""
    for pool in pools:
        for source, target in zip(sources, targets, strict=True):
            pool[target].copy_(pool[source])
