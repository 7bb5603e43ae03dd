"""Steps of a known load, timed by phase: what a step model is fitted to, and tested on.

Real steps of the serving loop: scheduler, policy, store, model and kernel, as a replay runs them. A load decodes a
batch of sequences of equal length, or prefills one prompt.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from kvarena.allocators.options import option
from kvarena.harness.engine.fixed_batch import FixedBatch
from kvarena.harness.engine.serving import Serving
from kvarena.harness.model.contract import Model
from kvarena.harness.requests.request import Request
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System


class KnownStep(NamedTuple):
    """One step: its load as a step model sees it (`harness/modelled/step_model.py`), and its seconds by phase."""

    tokens: int
    decodes: int
    context: int
    pairs: int
    step_s: float
    host_s: float  # scheduling, policy, actions, view
    append_s: float
    attention_s: float

    @property
    def projections_s(self) -> float:
        """What is left: the matrix products, and the small operators and sampling around them."""
        return self.step_s - self.host_s - self.append_s - self.attention_s


class Load(Protocol):
    """A load that can be run again and again."""

    def sample(self) -> KnownStep:
        """Run one step of it."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def decode_load(run: Run[object], system: System, model: Model, batch: int, context: int, steps: int) -> "Decode":
    """A batch of sequences of `context` tokens that can decode `steps` times."""
    return Decode(FixedBatch(_serving(run, system, model, batch, context + steps + 2), [context] * batch, steps))


def prefill_load(run: Run[object], system: System, model: Model, tokens: int) -> "Prefill":
    """One prompt of `tokens` tokens, by itself."""
    return Prefill(_serving(run, system, model, 1, tokens + 2), tokens)


def _serving(run: Run[object], system: System, model: Model, sequences: int, tokens: int) -> Serving:
    """The system over a pool of blocks for so many sequences of so many tokens."""
    layout, block = model.config.kv_layout(), option(system.allocator, "block_size")
    blocks = sequences * (-(-tokens // block) + 1)
    pool_bytes = round((blocks + 2) / (1 - 2 * option(system.allocator, "watermark"))) * block * layout.token_bytes
    return Serving(run, system, pool_bytes=pool_bytes, context=run.model.max_tokens, model=model)


class Decode:
    """Decodes one token of every sequence; they get longer by one each time."""

    def __init__(self, batch: FixedBatch) -> None:
        self._batch = batch

    def sample(self) -> KnownStep:
        """One decode step."""
        record = self._batch.step()
        host_s = record.schedule_s + record.view_s + record.actions_s
        size = record.batch
        return KnownStep(size, size, record.kv_tokens, 0, record.step_s, host_s, record.append_s, record.attention_s)

    def close(self) -> None:
        """Give the memory back."""
        self._batch.close()


class Prefill:
    """Serves a request of one output token, which is one step."""

    def __init__(self, serving: Serving, tokens: int) -> None:
        self._scheduler, self._executor, self._tokens = serving.scheduler, serving.torch_executor, tokens
        self._close = serving.close
        self._ids = self._fresh_ids()

    @staticmethod
    def _fresh_ids() -> Iterator[int]:
        yield from range(1 << 30)

    def sample(self) -> KnownStep:
        """One prefill of a request not seen before."""
        request = Request(next(self._ids), self._tokens, output_tokens=1)
        self._executor.known(request)  # its prompt is drawn before the clock starts
        start = time.perf_counter()
        self._scheduler.submit(request)
        plan = self._scheduler.schedule(now_ps=0)
        planned = time.perf_counter()
        self._executor.execute(plan)
        executed = time.perf_counter()
        self._scheduler.complete(plan, now_ps=0)
        end = time.perf_counter()
        self._executor.finish(request)
        phases = self._executor.phases
        host_s = planned - start + end - executed + phases["view"] + phases["actions"]
        pairs = self._tokens * (self._tokens + 1) // 2
        return KnownStep(self._tokens, 0, 0, pairs, end - start, host_s, phases["append"], phases["attention"])

    def close(self) -> None:
        """Give the memory back."""
        self._close()
