"""A replay as a Chrome trace, which Perfetto and chrome://tracing open: steps, maps, swaps, requests, memory.

One process for each system, with these threads: `engine` has the steps; `allocator` what a step waited for before its
forward pass; `background` what ran beside it; then one thread for each request, with the times it held memory. Counters
show the pool by leaf and the line. Times are microseconds, as the format wants; modelled ones.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from kvarena.allocators.policy import Action
from kvarena.allocators.usage import LEAVES
from kvarena.experiments.ours.step_frames import Film, Frame
from kvarena.harness.requests.request import Request

Event = dict[str, object]

_PS_PER_US = 10**6
_ENGINE, _ALLOCATOR, _BACKGROUND, _REQUESTS = 1, 2, 3, 10  # thread ids; a request's is its own + _REQUESTS


def chrome_trace(films: Iterable[Film], about: Mapping[str, object] | None = None) -> dict[str, object]:
    """The JSON object format: `traceEvents` and `otherData`."""
    events = [event for pid, film in enumerate(films, start=1) for event in _process(pid, film)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about or {}}


def _process(pid: int, film: Film) -> Iterator[Event]:
    yield _named(pid, 0, "process_name", f"{film.system} (modelled)")
    for tid, name in ((_ENGINE, "engine"), (_ALLOCATOR, "allocator"), (_BACKGROUND, "background")):
        yield _named(pid, tid, "thread_name", name)
    waiting, used = None, [leaf for leaf in LEAVES if film.steps[leaf].any()]
    for step, (frame, row) in enumerate(zip(film.frames, film.steps.to_dict("records"), strict=True)):
        start, duration = row["start_ps"] / _PS_PER_US, row["duration_ps"] / _PS_PER_US
        yield _slice(pid, _ENGINE, _title(frame), start, duration, step=step, **_counts(frame))
        yield from _work(pid, _ALLOCATOR, frame.actions, start, film)
        before = film.prices.total_ps(frame.actions) / _PS_PER_US
        yield from _work(pid, _BACKGROUND, frame.ahead, start + before, film)
        yield _counter(pid, "pool, bytes", start, {leaf: int(row[leaf]) for leaf in used})
        if row["waiting"] != waiting:
            waiting = row["waiting"]
            yield _counter(pid, "requests waiting", start, {"waiting": int(waiting)})
    for request in film.requests:
        yield from _request(pid, film, request)


def _title(frame: Frame) -> str:
    parts = [f"prefill {sum(tokens for _, tokens in frame.prefills)} tokens"] if frame.prefills else []
    return " + ".join(parts + ([f"decode {len(frame.decodes)}"] if frame.decodes else []))


def _counts(frame: Frame) -> dict[str, object]:
    """What else a step did, by request."""
    named = {"preempted": frame.preempted, "swapped_out": frame.swapped_out, "swapped_in": frame.swapped_in}
    return {"decodes": len(frame.decodes)} | {name: list(ids) for name, ids in named.items() if ids}


def _work(pid: int, tid: int, actions: Iterable[Action], start: float, film: Film) -> Iterator[Event]:
    """Maps, unmaps, copies and swaps, one after the other; equal ones in a row are one slice."""
    for kind, several in groupby(actions, key=lambda action: type(action).__name__):
        batch = list(several)
        duration = film.prices.total_ps(batch) / _PS_PER_US
        yield _slice(pid, tid, f"{kind} x {len(batch)}", start, duration, **_first(batch[0]))
        start += duration


def _first(action: Action) -> dict[str, object]:
    return {f"first_{name}": value for name, value in action._asdict().items()}


def _request(pid: int, film: Film, request: Request) -> Iterator[Event]:
    """When the request arrived, when it held memory, and when that was taken from it."""
    seq_id, tid = request.seq_id, _REQUESTS + request.seq_id
    yield _named(pid, tid, "thread_name", f"request {seq_id}")
    lengths = {"prompt_tokens": request.prompt_tokens, "output_tokens": request.output_tokens}
    yield _instant(pid, tid, "arrival", request.arrival_ps / _PS_PER_US, lengths)
    ends = film.steps.start_ps + film.steps.duration_ps
    steps = list(zip(film.frames, film.steps.start_ps / _PS_PER_US, ends / _PS_PER_US, strict=True))
    for running, rows in groupby(steps, key=lambda step: seq_id in step[0].holdings):
        if running:
            stretch = list(rows)
            (first, start, _), (last, _, end) = stretch[0], stretch[-1]
            yield _slice(pid, tid, "running", start, end - start, **_held(first, last, seq_id))
    for frame, start, _ in steps:
        for name in ("preempted", "swapped_out", "swapped_in"):
            if seq_id in getattr(frame, name):
                yield _instant(pid, tid, name.replace("_", " "), start, {})


def _held(first: Frame, last: Frame, seq_id: int) -> dict[str, int]:
    begin, end = first.holdings[seq_id], last.holdings[seq_id]
    return {"units_at_first": len(begin.units), "units_at_last": len(end.units), "tokens_at_last": end.length}


def _slice(pid: int, tid: int, name: str, start: float, duration: float, **args: object) -> Event:
    return {"name": name, "ph": "X", "ts": start, "dur": duration, "pid": pid, "tid": tid, "args": args}


def _instant(pid: int, tid: int, name: str, at: float, args: dict[str, int]) -> Event:
    return {"name": name, "ph": "i", "s": "t", "ts": at, "pid": pid, "tid": tid, "args": args}


def _counter(pid: int, name: str, at: float, args: dict[str, int]) -> Event:
    return {"name": name, "ph": "C", "ts": at, "pid": pid, "args": args}


def _named(pid: int, tid: int, kind: str, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
