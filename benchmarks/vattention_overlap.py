"""How much of vAttention's mapping hides behind the decode step: Fig 12 in three numbers, on this machine.

    .venv/bin/python -P benchmarks/vattention_overlap.py [--quick]

Each round decodes the few steps around a growth of *all* sequences at once (a spike of Fig 12), three ways:

    T_sync        the page-groups are mapped in the step that needs them
    T_overlap     they are mapped beside the step before it
    T_premapped   they are mapped already: the row has all it will need

    hidden share = 1 - (T_overlap - T_premapped) / (T_sync - T_premapped)

A step is attention over every layer, one thread, so that a core is left to map on where there are two. Ways are
interleaved; medians with 95 % intervals. Beside the times, which a busy machine blurs: what the critical path spent
in driver calls and in waiting for the background, as the store counts it. That leaves out what the two cost each other.
"""

import argparse
import random
from time import perf_counter

import torch

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.policy import Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionPolicy
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.harness.record.statistics import Estimate, median_interval
from kvarena.kernels.registry import get_kernel
from kvarena.kernels.threads import set_compute_threads

LAYERS, KV_HEADS, HEADS, SIZE = 8, 4, 8, 64  # float32: 1 KB a token and tensor, 64 tokens a page-group
TOKENS = 64
WAYS = ("sync", "overlap", "premapped")


class Decode:
    """A batch of equal sequences, attended layer by layer; one pool for all ways, so that they read the same pages."""

    def __init__(self, batch: int, context: int, steps: int) -> None:
        self.batch, self.context, self.steps = batch, context, steps
        self.way = "sync"
        layout = attention_layout(LAYERS, KV_HEADS, SIZE, "float32")
        per_sequence = (context // TOKENS + 2) * 2 * LAYERS * 64 * KB
        self.policy = VAttentionPolicy(
            layout,
            batch * per_sequence,
            max_tokens=context + 2 * TOKENS,
            max_rows=batch,
            page_group="64KB",
            watermark=0.0,
            deferred_reclamation=False,
            eager_allocation=False,
            reclaim_threshold=0.0,
        )
        self.store = VirtualStore(self.policy, ModelShape(LAYERS, KV_HEADS, SIZE, torch.float32))
        self.kernel = get_kernel("numba")
        self.query = torch.randn(batch, HEADS, SIZE)
        self.out = torch.empty_like(self.query)

    def round(self, way: str) -> tuple[float, float, int]:
        """Of the steps around one growth: seconds, those in driver calls or waiting for them, calls waited for."""
        self.way, self.policy.overlap = way, way == "overlap"
        prompt = self.context - self.steps // 2  # the growth falls in the middle
        ids = list(range(self.batch))
        for seq_id in ids:
            tokens = self.context + TOKENS if self.way == "premapped" else prompt
            assert self.policy.admit(Sequence(seq_id, tokens, 0), tokens)
        self.store.apply(self.policy.drain())
        self._touch(ids, prompt + self.steps)
        before = self.store.driver_calls()
        start = perf_counter()
        for step in range(self.steps):
            self._step(ids, prompt + step + 1)
        seconds = perf_counter() - start
        after = self.store.driver_calls()
        exposed = after.critical_s + after.waited_s - before.critical_s - before.waited_s
        for seq_id in ids:
            self.policy.release(seq_id)
        self.store.apply(self.policy.drain())
        return seconds, exposed, after.critical - before.critical

    def _step(self, ids: list[int], length: int) -> None:
        if self.way != "premapped":
            for seq_id in ids:
                assert self.policy.grow(seq_id)
        self.store.apply(self.policy.drain())
        view = self.store.view(ids, [length] * self.batch, [1] * self.batch)
        self.store.apply_in_background(self.policy.look_ahead())
        for layer in range(LAYERS):
            self.kernel.decode(self.query, self.store.layer(layer), view, self.out)

    def _touch(self, ids: list[int], length: int) -> None:
        """One step that is not timed: caches warm, kernel compiled. What is not mapped yet stays untouched."""
        mapped = min(length, *(self.policy.length(seq_id) for seq_id in ids))
        view = self.store.view(ids, [mapped] * self.batch, [1] * self.batch)
        self.kernel.decode(self.query, self.store.layer(0), view, self.out)


def show(what: str, estimate: Estimate, unit: str) -> None:
    """One line: median and interval."""
    print(f"{what:44} {estimate:.3f} {unit} n={estimate.n}")


def main() -> None:
    """Print the three times and the hidden share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    set_compute_threads(1)
    decode = Decode(given.batch, given.context, given.steps)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    calls: dict[str, int] = {}
    for way in WAYS:
        decode.round(way)
    for _ in range(8 if given.quick else 30):
        for way in random.sample(WAYS, len(WAYS)):
            seconds, exposed, calls[way] = decode.round(way)
            times[way].append(1e3 * seconds)
            waits[way].append(1e3 * exposed)
    for way in WAYS:
        show(f"T_{way}, {given.steps} steps, {calls[way]} calls on critical path", median_interval(times[way]), "ms")
    spikes = [s - p for s, p in zip(times["sync"], times["premapped"], strict=True)]
    left = [o - p for o, p in zip(times["overlap"], times["premapped"], strict=True)]
    show("spike: T_sync - T_premapped", median_interval(spikes), "ms")
    show("left of it: T_overlap - T_premapped", median_interval(left), "ms")
    hidden = 1 - median_interval(left).median / median_interval(spikes).median
    print(f"{'hidden share, from these medians':44} {hidden:9.3f}")
    for way in WAYS:
        show(f"driver calls and waiting for them, {way}", median_interval(waits[way]), "ms")
    hidden = 1 - median_interval(waits["overlap"]).median / median_interval(waits["sync"]).median
    print(f"{'hidden share, as the store counts':44} {hidden:9.3f}")
    decode.store.close()


if __name__ == "__main__":
    main()
