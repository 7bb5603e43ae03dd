"""A workload: which requests arrive, and when."""

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.accounts.trace_account import Arrivals, TraceAccount, account_of
from kvarena.harness.requests.block_ids import MOONCAKE_BLOCK
from kvarena.harness.requests.chatbot_order import chatbot_order
from kvarena.harness.seeded import Floats, Ints
from kvarena.harness.trace.arrival import PS, ArrivalConfig, check, draw_arrivals
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.load import load_trace
from kvarena.harness.trace.trace import Trace


@dataclass(frozen=True, slots=True)
class Workload:
    """N requests in order of arrival. All arrays are [N] int64."""

    prompt_tokens: Ints
    output_tokens: Ints
    arrival_ps: Ints  # picoseconds since the run began
    provenance: dict[str, Any] = field(default_factory=dict)
    conversation_ids: Ints | None = None
    hash_ids: tuple[Ints, ...] | None = None
    block_tokens: int = MOONCAKE_BLOCK  # that an id of hash_ids stands for
    account: TraceAccount | None = None  # of the trace as a whole, also in `first`

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def first(self, count: int) -> "Workload":
        """The first requests to arrive."""
        ids = self.conversation_ids
        return Workload(
            self.prompt_tokens[:count], self.output_tokens[:count], self.arrival_ps[:count], self.provenance,
            None if ids is None else ids[:count], None if self.hash_ids is None else self.hash_ids[:count],
            self.block_tokens, self.account,
        )  # fmt: skip

    @property
    def arrival_s(self) -> Floats:
        """Times of arrival in seconds."""
        return self.arrival_ps / PS

    @property
    def rate(self) -> float:
        """Requests per second from the first to the last arrival; infinite if all come at once."""
        span_ps = int(self.arrival_ps[-1] - self.arrival_ps[0])
        return (len(self) - 1) * PS / span_ps if span_ps else float("inf")


def make_workload(
    trace: TraceConfig, arrival: ArrivalConfig, max_tokens: int | None = None, chosen: str = ""
) -> Workload:
    """Requests and their arrivals: the same for the same seeds, on every platform.

    With `arrival.duration_s` as many requests are taken as arrive, else one arrives for each of the trace.
    `max_tokens` is the model's context, `chosen` who chose the arrivals. Raises UserError for what the user got wrong.
    """
    check(arrival)
    seed = trace.seed if arrival.seed is None else arrival.seed
    asked = None
    if arrival.process == "recorded":
        requests, times = _recorded(load_trace(trace, max_tokens), arrival)
    elif arrival.process == "all_at_once":
        requests = load_trace(trace, max_tokens)
        times = np.zeros(len(requests), np.int64)
    elif arrival.duration_s is None:
        requests = load_trace(trace, max_tokens)
        times = draw_arrivals(arrival, len(requests), seed)
    else:
        times = draw_arrivals(arrival, trace.num_requests, seed)
        _check_not_empty(times, arrival)
        asked = len(times)
        if trace.path is not None and trace.num_requests is not None and not trace.repeat:
            requests = load_trace(replace(trace, num_requests=len(times)), max_tokens)
            times = times[: len(requests)]
        else:
            requests = load_trace(trace, max_tokens, len(times))
    if trace.new_conversation is not None and arrival.process != "recorded":  # else turns come as they are recorded
        requests = requests.take(chatbot_order(_conversations(requests), trace.new_conversation, seed))
    elif arrival.process == "artifact":
        requests = _shuffled(requests, seed)
    arrivals = Arrivals(replace(arrival, seed=seed), chosen, float(times.max() / PS))
    account = account_of(trace, requests, asked, arrivals)
    account = account.without(f"beyond arrival.duration_s={arrival.duration_s}", account.taken - account.served)
    facts = {"trace": requests.provenance, "arrival": asdict(arrival) | {"seed": seed}, "account": asdict(account)}
    return Workload(
        requests.prompt_tokens, requests.output_tokens, times, facts, requests.conversation_ids, requests.hash_ids,
        requests.block_tokens or MOONCAKE_BLOCK, account,
    )  # fmt: skip


def _conversations(requests: Trace) -> Ints:
    if requests.conversation_ids is None:
        raise UserError(f"trace.new_conversation: {requests.source} has no conversations (conversation_id)")
    return requests.conversation_ids


def _shuffled(requests: Trace, seed: int) -> Trace:
    """The artifact takes the first N pairs of its file, then shuffles them with Python's generator."""
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    return requests.take(np.array(order, np.int64))


def _recorded(requests: Trace, arrival: ArrivalConfig) -> tuple[Trace, Ints]:
    """The trace's own stamps, in order; requests of one stamp keep the file's order."""
    if requests.arrival_s is None:
        raise UserError(f"arrival=recorded: {requests.source} records no times of arrival")
    if requests.provenance["rounds"] > 1:
        raise UserError(
            f"arrival=recorded: {requests.source} has fewer than trace.num_requests={len(requests)} requests"
        )
    times = np.rint(requests.arrival_s * PS).astype(np.int64)
    order = np.argsort(times, kind="stable")
    if arrival.duration_s is not None:
        order = order[times[order] < round(arrival.duration_s * PS)]
    _check_not_empty(order, arrival)
    return requests.take(order), times[order]


def _check_not_empty(times: Ints, arrival: ArrivalConfig) -> None:
    if not len(times):
        raise UserError(f"no request arrives within arrival.duration_s={arrival.duration_s}")
