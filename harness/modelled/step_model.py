"""How long a step takes on a modelled device: integers throughout, so that k steps sum exactly.

    host    = host_step + host_sequence x decodes
    device  = max(weights, token x tokens) + context x K/V tokens read + pair x prefill pairs + link
    step    = max(host, launch, device)  where the engine overlaps them, else host + max(launch, device)

In a stretch of decode steps every sequence gets longer by one each step, so `device` grows by context x decodes.
"""

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

from kvarena.harness.scheduler.step import StepTime

PS_PER_S = 10**12


class StepLoad(NamedTuple):
    """What one step has to do."""

    tokens: int  # fed to the model, padding included
    decodes: int  # sequences that decode
    context: int  # tokens whose K/V the decodes read, their own included
    pairs: int = 0  # (query, key) pairs of the prefills


class SteadyRun(NamedTuple):
    """A stretch of decode steps: the j-th, from 0, takes first + j x slope, for as many as `steps` of them."""

    first_ps: int
    slope_ps: int
    steps: int

    def duration_ps(self, steps: int) -> int:
        """Time of the first `steps` steps."""
        return steps * self.first_ps + self.slope_ps * (steps * (steps - 1) // 2)

    def steps_to(self, gap_ps: int) -> int:
        """The fewest steps that take at least `gap_ps`."""
        if self.slope_ps == 0:
            return -(-gap_ps // self.first_ps)
        a, b = self.slope_ps, 2 * self.first_ps - self.slope_ps  # a k^2 + b k = 2 x duration of k steps
        steps = max(0, (isqrt(max(0, b * b + 8 * a * gap_ps)) - b) // (2 * a))
        while self.duration_ps(steps) < gap_ps:
            steps += 1
        return steps

    def take(self, steps: int) -> StepTime:
        """The first `steps` steps as one."""
        return StepTime(self.duration_ps(steps), 0, self.slope_ps if steps > 1 else 0)


FOREVER = 1 << 62  # steps


@dataclass(frozen=True, slots=True)
class StepModel:
    """Coefficients of the formulas above, in picoseconds."""

    overlaps_host: bool
    host_step_ps: int
    host_sequence_ps: int  # per decode
    weights_ps: int  # reading all weights once
    token_ps: int  # arithmetic of one token
    context_ps: int  # reading the K/V of one token
    pair_ps: int = 0  # attention arithmetic of one (query, key) pair over all layers
    link_step_ps: int = 0  # between devices, per step
    link_token_ps: int = 0  # and per token
    launch_ps: int = 0  # host: launching a step's kernels, while the device runs those before

    def step_ps(self, load: StepLoad) -> int:
        """Time of one step, without transfers."""
        serial, least = self._host_ps(load)
        return serial + max(least, self._device_ps(load))

    def steady(self, load: StepLoad) -> SteadyRun:
        """The decode steps that follow from here with the same sequences, until the device outlasts the host."""
        serial, least = self._host_ps(load)
        device, slope = self._device_ps(load), self.context_ps * load.decodes
        if device > least or not slope:
            return SteadyRun(serial + max(least, device), slope, FOREVER)
        return SteadyRun(serial + least, 0, (least - device) // slope + 1)

    def _host_ps(self, load: StepLoad) -> tuple[int, int]:
        """Host time that adds up with the device's, and that which runs beside it."""
        host = self.host_step_ps + self.host_sequence_ps * load.decodes
        return (0, max(host, self.launch_ps)) if self.overlaps_host else (host, self.launch_ps)

    def _device_ps(self, load: StepLoad) -> int:
        return (
            max(self.weights_ps, self.token_ps * load.tokens)
            + self.context_ps * load.context
            + self.pair_ps * load.pairs
            + self.link_step_ps
            + self.link_token_ps * load.tokens
        )
