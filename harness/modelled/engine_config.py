"""Engines as data: what a serving engine adds to what the hardware must do."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from kvarena.errors import UserError
from kvarena.harness.modelled.attention_cost import AttentionCost, HostTime


@dataclass
class FittedStep:
    """A step's time, fitted: base + max(weights, token x tokens) + sequence x decodes + context x K/V tokens read."""

    base_ms: float
    weights_ms: float  # reading all weights once
    token_ms: float  # arithmetic of one token
    sequence_ms: float  # host work for one decoding sequence
    context_ms: float = 0.0  # reading the K/V of one token; 0 where it is folded into sequence_ms
    kv_blocks: int | None = None  # of 16 tokens: the pool that was run with
    device: str | None = None  # of conf/device/: what they were fitted on; they hold nowhere else
    tp: int = 1  # devices that shared the model
    assumed: str = ""  # where they were not fitted but taken over: from what


@dataclass
class EngineConfig:
    """conf/engine/*.yaml."""

    name: str
    overlaps_host: bool  # step = max(host, device); else the host's time adds up with the device's
    host_step_us: float = 0.0  # host work of a step
    host_sequence_us: float = 0.0  # host work for each sequence of a step
    weights_efficiency: float = 1.0  # share of the device's bandwidth that reading weights reaches
    kv_efficiency: float = 1.0  # and that attention reaches, reading K/V
    flop_efficiency: float = 1.0  # share of the device's arithmetic
    cuda_graphs: bool = False  # measured on a GPU: steps that only decode are replayed as CUDA graphs
    fitted: dict[str, FittedStep] = field(default_factory=dict)  # "model" or "model/scheduler" -> constants
    hosts: dict[int, HostTime] = field(default_factory=dict)  # by tensor-parallel degree: in place of the above
    devices: list[str] = field(default_factory=list)  # that it was fitted on; empty: it holds on any
    schedulers: list[str] = field(default_factory=list)  # that it was fitted under; empty: under any
    models: list[str] = field(default_factory=list)  # that its paper served; empty: it holds for any
    calibrated_on: list[str] = field(default_factory=list)  # published points of the fit, as patterns
    left_out: list[str] = field(default_factory=list)  # those of them that were not used
    attention: dict[str, AttentionCost] = field(default_factory=dict)  # "kernel/layout" -> in place of the efficiencies

    def __post_init__(self) -> None:
        """Refuse efficiencies that no kernel has."""
        for key in ("weights_efficiency", "kv_efficiency", "flop_efficiency"):
            if not 0 < getattr(self, key) <= 1:
                raise UserError(f"engine.{key}={getattr(self, key)} ({self.name}): must be above 0, at most 1")

    def constants(self, model: str, scheduler: str) -> FittedStep | None:
        """Constants fitted for the model, those for the pair of model and scheduler first."""
        return self.fitted.get(f"{model}/{scheduler}") or self.fitted.get(model)

    def host(self, tp: int) -> HostTime:
        """Host work of a step on `tp` devices. Raises UserError where it is known for others only."""
        if not self.hosts:
            return HostTime(self.host_step_us, self.host_sequence_us, 0.0)
        if tp not in self.hosts:
            known = ", ".join(str(degree) for degree in self.hosts)
            raise UserError(f"model.tp={tp}: engine={self.name} knows the host's work for {known}")
        return self.hosts[tp]

    def attention_cost(self, kernel: str | None) -> AttentionCost:
        """What attention costs with `kernel` ("library/layout"); one cost for all where the engine tells none apart.

        Raises UserError for a kernel that the engine does not know.
        """
        if not self.attention:
            return AttentionCost(self.kv_efficiency, self.flop_efficiency)
        if kernel not in self.attention:
            raise UserError(
                f"engine={self.name} has no attention cost for {kernel}. There are: {', '.join(self.attention)}; "
                "engine=lean tells no kernels apart"
            )
        return self.attention[kernel]

    def was_fitted_to(self, point: str) -> bool:
        """Whether a published point, "figure/panel/system/x" with nothing for an x that it has not, entered the fit.

        In `calibrated_on` * stands for any text and [abc] for one of these letters.
        """
        return point not in self.left_out and any(fnmatchcase(point, each) for each in self.calibrated_on)
