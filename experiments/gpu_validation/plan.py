"""The steps in the order in which they run: the cheapest and most decisive first."""

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.step import Step

STEPS = (
    Step("environment", "versions, GPU, driver, which kernels are there", 150, 150),
    Step("driver-contract", "the tests of the virtual-memory driver and of the stores that are marked gpu", 60, 60),
    Step("addresses", "tensors over reserved addresses, and what the driver's documentation leaves open", 40, 15),
    Step("edge", "whether a kernel touches memory past the mapped end of a row", 70, 30),
    Step("kernels", "every kernel against float64 on fresh random inputs: rows, blocks in order, shuffled", 150, 90),
    Step("bandwidth", "a read-only reduction, a copy, a matrix product", 40, 20),
    Step("latencies", "vAttention Tables 3 and 9", 80, 60),
    Step("sweep", "GB/s of decode attention by batch and context, beside the reduction", 90, 30),
    Step("decode", "decode throughput, one kernel over static, paged and vAttention memory", 150, 60),
    Step("prefill", "prefill throughput, one kernel over static, paged and vAttention memory", 80, 50),
    Step("overlap", "mapping beside the forward pass, and without", 60, 60),
    Step("replay", "a small trace served end to end: every allocator yields the same tokens", 60, 30),
    Step("graphs", "decode steps captured in CUDA graphs", 90, 60),
    Step("models", "the papers' models, their weights drawn on the device", 60, 30),
)


def step_named(name: str) -> Step:
    """A step by its name. Raises UserError with the names that exist."""
    for step in STEPS:
        if step.name == name:
            return step
    raise UserError(f"--only {name}: no such step. There are: {', '.join(step.name for step in STEPS)}")
