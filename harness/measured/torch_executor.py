"""The measured clock: a step is a forward pass of a real model over a real KV cache."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kvarena.allocators.memory.staging import indices_on
from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import CopyBlock, CopyRow, SwapIn, SwapOut
from kvarena.harness.decoding.decoder import Decoder
from kvarena.harness.measured.decode_graphs import DecodeGraphs
from kvarena.harness.measured.stopwatch import Stopwatch
from kvarena.harness.model.contract import Attend, Model
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import Executor, StepPlan, StepTime
from kvarena.kernels.append import append
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.view import BatchView

COPIES = (CopyBlock, CopyRow, SwapIn, SwapOut)  # actions that a device performs; all others are the driver's

Phase = Callable[[str], AbstractContextManager[None]]  # times a region


def _untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


class TorchExecutor(Executor):
    """Runs plans on one model, one store and one kernel; `tokens` are the known ones, by seq_id.

    `phases` holds the seconds of the last step: actions, view, append, attention, and the whole `step`. A step that
    was replayed as a graph has no append or attention of its own. Copies are only launched: the device's own clock
    times them, and nobody waits for them.
    """

    def __init__(
        self, model: Model, store: Store, kernel: AttentionKernel, seed: int = 0, graphs_up_to: int | None = None
    ) -> None:
        """`graphs_up_to`: steps that only decode are captured, of sequences of so many tokens at most.

        Raises UserError where the kernel cannot be.
        """
        self.model, self.store, self.kernel = model, store, kernel
        self.phases: dict[str, float] = {}
        self.logits: Tensor | None = None  # [B, V] of the last step, decodes first
        self._decoder = Decoder(model.config.vocab_size, seed)
        self.tokens = self._decoder.tokens
        self._watch, self._copying = Stopwatch(model.device), Stopwatch(model.device)
        self._graphs = None if graphs_up_to is None else DecodeGraphs(kernel, model.device, graphs_up_to)

    def execute(self, plan: StepPlan) -> StepTime:
        """Run one iteration and feed every finished row its next token."""
        copies = any([isinstance(action, COPIES) for action in plan.actions])
        start = time.perf_counter_ns()
        with self._copying.phase("copies") if copies else nullcontext():
            self.store.apply(plan.actions)
        applied = time.perf_counter_ns()
        views = self._views(plan)
        self.store.apply_in_background(plan.ahead)
        viewed = time.perf_counter_ns()
        self.logits = self._forward(plan, views)
        self._decoder.deliver(plan, self.logits)
        end = time.perf_counter_ns()
        self._watch.add("view", (viewed - applied) / 1e9)
        self._watch.add("step", (end - start) / 1e9)
        self.phases = self._watch.read()
        self.phases["actions"] = max((applied - start) / 1e9, self._copying.read().get("copies", 0.0))
        return StepTime((end - start) * 1000, stall_ps=round(1e12 * self.phases["actions"]))

    @property
    def queue_full(self) -> bool:
        """Whether the last step's append and attention are the device's time alone (`stopwatch.py`)."""
        return self._watch.queue_full

    def finish(self, request: Request) -> None:
        """Forget the tokens of a finished request."""
        self._decoder.finish(request)

    def survivors(self, group: Group) -> Sequence[int]:
        """As the model's own scores ranked the beams."""
        return self._decoder.survivors(group)

    def known(self, request: Request) -> list[int]:
        """Known tokens of a request; its prompt is drawn from the seed and its id, so every system sees the same."""
        return self._decoder.known(request)

    def _views(self, plan: StepPlan) -> tuple[BatchView | None, BatchView | None]:
        """Where decodes and prefills find their K/V; None where there are none."""
        decode = prefill = None
        if plan.decodes:
            ids = [r.seq_id for r in plan.decodes]
            decode = self.store.view(ids, [r.computed + 1 for r in plan.decodes], [1] * len(ids))
        if plan.prefills:
            ids = [chunk.request.seq_id for chunk in plan.prefills]
            lengths = [chunk.start + chunk.tokens for chunk in plan.prefills]
            prefill = self.store.view(ids, lengths, [chunk.tokens for chunk in plan.prefills])
        return decode, prefill

    def _forward(self, plan: StepPlan, views: tuple[BatchView | None, BatchView | None]) -> Tensor:
        fed = [self.known(r)[r.computed] for r in plan.decodes]
        decode, prefill = views
        if self._graphs is not None and decode is not None and prefill is None:
            return self._graphs.run(self._decode_step, fed, decode, self.store.layer(0))
        positions = [r.computed for r in plan.decodes]
        last = list(range(len(fed)))  # of each sequence, in the packed batch
        for request, start, count in plan.prefills:
            fed += self.known(request)[start : start + count]
            positions += range(start, start + count)
            last.append(len(fed) - 1)
        sent = indices_on(self.model.device, [*fed, *positions, *last])  # one copy, which nobody waits for
        tokens, at, logits_at = sent.split_with_sizes([len(fed), len(fed), len(last)])
        return self.model.forward(tokens, at, self._attend(len(plan.decodes), *views, self._watch.phase), logits_at)

    def _decode_step(self, tokens: Tensor, positions: Tensor, view: BatchView, logits_at: Tensor) -> Tensor:
        """A step that only decodes, with nothing that a graph cannot hold."""
        return self.model.forward(tokens, positions, self._attend(len(tokens), view, None, _untimed), logits_at)

    def _attend(self, num_decodes: int, decode: BatchView | None, prefill: BatchView | None, phase: Phase) -> Attend:
        """Decodes come first in a packed batch, prefills after them; each part has its own view and kernel."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache, out = self.store.layer(layer), torch.empty_like(q)
            for view, rows, attention in (
                (decode, slice(None, num_decodes), self.kernel.decode),
                (prefill, slice(num_decodes, None), self.kernel.prefill),
            ):
                if view is not None:
                    with phase("append"):
                        append(k[rows], v[rows], cache, view)
                    with phase("attention"):
                        attention(q[rows], cache, view, out[rows])
            return out

        return attend
