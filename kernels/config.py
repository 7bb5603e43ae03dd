"""What conf/kernel/*.yaml may say."""

from dataclasses import dataclass


@dataclass
class KernelConfig:
    """One kernel, by its name in the catalogue."""

    name: str
