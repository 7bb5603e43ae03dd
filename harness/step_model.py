"""How long a step takes on a modelled device: integers throughout, so that k steps sum exactly.

    host    = host_step + host_sequence x decodes
    device  = max(weights, token x tokens) + context x K/V tokens read + pair x prefill pairs + link
    step    = max(host, device)  where the engine overlaps them, else host + device

In a stretch of decode steps every sequence gets longer by one each step, so `device` grows by context x decodes.
"""

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

from kvarena.harness.step import StepTime

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

    def step_ps(self, load: StepLoad) -> int:
        """Time of one step, without transfers."""
        host, device = self._host_ps(load), self._device_ps(load)
        return max(host, device) if self.overlaps_host else host + device

    def steady(self, load: StepLoad) -> SteadyRun:
        """The decode steps that follow from here with the same sequences, until the greater of the two changes."""
        host, device = self._host_ps(load), self._device_ps(load)
        slope = self.context_ps * load.decodes
        if not self.overlaps_host:
            return SteadyRun(host + device, slope, FOREVER)
        if device > host:
            return SteadyRun(device, slope, FOREVER)
        return SteadyRun(host, 0, (host - device) // slope + 1 if slope else FOREVER)

    def _host_ps(self, load: StepLoad) -> int:
        return self.host_step_ps + self.host_sequence_ps * load.decodes

    def _device_ps(self, load: StepLoad) -> int:
        return (
            max(self.weights_ps, self.token_ps * load.tokens)
            + self.context_ps * load.context
            + self.pair_ps * load.pairs
            + self.link_step_ps
            + self.link_token_ps * load.tokens
        )
