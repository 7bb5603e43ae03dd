"""What a serving engine's host and its attention kernels cost, as data: the constants that one paper's tables give."""

from dataclasses import dataclass

from kvarena.errors import UserError


@dataclass
class HostTime:
    """Host work of a step: some before and after the kernels, and launching them, which the device may hide."""

    step_us: float
    sequence_us: float  # for each decoding sequence
    layer_us: float  # launching the kernels of one layer


@dataclass
class AttentionCost:
    """One library's attention over one layout of K/V, and what goes with it."""

    read_efficiency: float  # decode: share of the device's bandwidth, reading K/V
    flop_efficiency: float  # prefill: share of the device's arithmetic
    reads_per_head: bool = False  # every query head reads K/V itself; else those of one KV head share it
    step_us: float = 0.0  # host work in every step: block tables to build and take down
    append_ns: float = 0.0  # per token and layer, beyond what every layout costs: writing K/V block by block

    def __post_init__(self) -> None:
        """Refuse efficiencies that no kernel has; a cache may serve K/V that is read per head faster than memory."""
        if not 0 < self.flop_efficiency <= 1:
            raise UserError(f"engine.attention: flop_efficiency={self.flop_efficiency} must be above 0, at most 1")
        if self.read_efficiency <= 0 or (self.read_efficiency > 1 and not self.reads_per_head):
            raise UserError(f"engine.attention: read_efficiency={self.read_efficiency} must be above 0, at most 1")
