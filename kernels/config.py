"""What may be set of a kernel: which."""

from dataclasses import dataclass


@dataclass
class KernelConfig:
    """One kernel, by its name in the catalogue."""

    name: str
