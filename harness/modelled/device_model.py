"""Devices as data: what a data sheet or a measurement says of one, and nothing about models or engines."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from kvarena.errors import UserError

KINDS = ("auto", "cpu", "cuda", "modelled")


@dataclass
class DeviceConfig:
    """conf/device/*.yaml. All but name and kind describe a modelled device; GB are 1e9 bytes."""

    name: str
    kind: str  # of KINDS
    memory_gib: float | None = None  # as the driver reports it
    bandwidth_gb_per_s: float | None = None  # of device memory
    tflop_per_s: float | None = None  # dense fp16
    nvlink_gb_per_s: float | None = None  # per direction
    allreduce_us: float | None = None  # latency of one all-reduce
    copy_in_gb_per_s: float | None = None  # host to device, pinned memory
    copy_out_gb_per_s: float | None = None
    copy_in_us: float | None = None  # per copy call
    copy_out_us: float | None = None
    map_us: dict[str, float] = field(default_factory=dict)  # page-group -> map one and grant access
    unmap_us: dict[str, float] = field(default_factory=dict)
    reported_as: list[str] = field(default_factory=list)  # by its driver: a GPU of that name is this device, measured
    calibrated_on: list[str] = field(default_factory=list)  # published points that its numbers were fitted to
    assumed: str = ""  # what of it is neither stated nor measured anywhere, and decides what it gives

    def __post_init__(self) -> None:
        """Refuse a kind that does not exist."""
        if self.kind not in KINDS:
            raise UserError(f"device.kind={self.kind} ({self.name}): is none of {', '.join(KINDS)}")

    def was_fitted_to(self, point: str) -> bool:
        """Whether a published point ("figure/panel/system/x") is one that its numbers were fitted to."""
        return any(fnmatchcase(point, each) for each in self.calibrated_on)

    def need(self, key: str) -> float:
        """A number of a device model. Raises UserError where the device has none, or none above 0."""
        value = getattr(self, key)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"device.{key}={value} ({self.name}): a device model needs a number above 0 here")
        return float(value)
