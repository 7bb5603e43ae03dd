"""Pictures of a replay: they show what the policy's books say, and open where they should."""

import json
import re
from collections import defaultdict
from itertools import pairwise

import pandas as pd
import pytest

from kvarena.allocators.holding import OWNED
from kvarena.allocators.policy import Map, Unmap
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.ours import memory_timeline
from kvarena.experiments.ours.chrome_trace import chrome_trace
from kvarena.experiments.ours.step_frames import Film, film
from kvarena.experiments.ours.stepped_view import stepped_view
from kvarena.experiments.ours.timeline import timeline

SMALL = ("experiment=memory_timeline", "trace.num_requests=8", "trace.max_tokens=256")
SYSTEMS = "systems=[orca-max,contiguous,paged-reserved,paged,vattention-2mb,vattention-sliced-2mb]"


@pytest.fixture(scope="module")
def films() -> dict[str, Film]:
    run = compose_run(*SMALL, SYSTEMS, "params.pool_bytes=1073741824")
    return {system.name: film(run, system, workload_of(run)) for system in run.systems}


def test_what_requests_hold_sums_to_the_pool_s_leaves(films):
    for name, one in films.items():
        assert len(one.frames) == len(one.steps) > 100
        for frame, row in zip(one.frames, one.steps.to_dict("records"), strict=True):
            held = [sum(leaves) for leaves in zip(*(h.leaves for h in frame.holdings.values()), strict=True)]
            for leaf, total in zip(OWNED[:4], held, strict=False):
                assert row[leaf] == total, (name, leaf)


def test_no_unit_has_two_owners(films):
    for one in films.values():
        for frame in one.frames:
            units = [*frame.idle_units, *(unit for h in frame.holdings.values() for unit in h.units)]
            assert len(units) == len(set(units))
            assert all(0 <= unit < one.num_units for unit in units)


def test_the_film_is_the_replay():
    """Filming takes every step alone, and changes nothing."""
    run = compose_run(*SMALL, "systems=[paged,vattention-2mb]", "params.pool_bytes=1073741824")
    workload = workload_of(run)
    for system in run.systems:
        filmed = film(run, system, workload).request_table.drop(columns="system")
        served = Replayer(run).serve(system, workload).requests.drop(columns="system")
        pd.testing.assert_frame_equal(filmed, served)


def test_the_timeline_begins_and_ends_with_each_request(films):
    table = timeline(films["paged"])
    ends = table[table["bytes"] == 0].groupby("request").time_s.max()
    finish = {r.seq_id: r.finish_ps / 10**12 for r in films["paged"].requests}
    assert set(ends.index) == set(finish)
    for request, end in ends.items():
        assert end >= finish[request]  # gone by the step that follows, which may begin later


def test_counts_that_the_papers_state(films):
    assert memory_timeline.most_unwritten(films["paged"]) == 0
    assert memory_timeline.most_unwritten(films["orca-max"]) > 0
    assert memory_timeline.most_mapped(films["vattention-2mb"]) == 1
    assert memory_timeline.most_mapped(films["paged"]) == 0


def test_the_trace_has_the_format_that_perfetto_reads(films):
    trace = json.loads(json.dumps(chrome_trace(films.values(), {"clock": "modelled"})))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    needed = {"X": {"ts", "dur", "pid", "tid"}, "i": {"ts", "pid", "tid", "s"}, "C": {"ts", "pid"}, "M": {"pid", "tid"}}
    for event in trace["traceEvents"]:
        assert {"name", "ph", "args"} | needed[event["ph"]] == set(event)
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def test_slices_of_a_thread_do_not_overlap(films):
    """Slices of one thread must nest, or Perfetto draws them wrong."""
    threads = defaultdict(list)
    for event in chrome_trace(films.values())["traceEvents"]:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) > 2 * len(films)
    for slices in threads.values():
        slices.sort()
        for (_, end), (start, _) in pairwise(slices):
            assert start >= end - 1e-6


def test_the_trace_has_every_map_and_unmap(films):
    one = films["vattention-2mb"]
    actions = [a for frame in one.frames for a in (*frame.actions, *frame.ahead)]
    counts = defaultdict(int)
    for event in chrome_trace([one])["traceEvents"]:
        if match := re.fullmatch(r"(Map|Unmap) x (\d+)", event["name"]):
            counts[match[1]] += int(match[2])
    assert counts == {
        "Map": sum(isinstance(a, Map) for a in actions),
        "Unmap": sum(isinstance(a, Unmap) for a in actions),
    }
    assert counts["Map"] > 0


def test_the_stepped_view_replays_to_the_film(films):
    """What its script does with the changes gives every frame back."""
    page = stepped_view(films.values(), "<small> replay")
    assert "<title>&lt;small&gt; replay</title>" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    for shown, one in zip(data, films.values(), strict=True):
        owned = {}
        for step, frame in zip(shown["steps"], one.frames, strict=True):
            owned |= {int(k): v for k, v in step["own"].items()}
            now = {k: tuple(v) for k, v in owned.items() if v}
            expected = {k: h.units for k, h in frame.holdings.items()}
            expected |= {-1: frame.idle_units} if frame.idle_units else {}
            assert now == expected


def test_a_run_writes_all_pictures(finished):
    folder = finished("memory_timeline", "trace.num_requests=4", "trace.max_tokens=128", "systems=[paged]")
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert "<canvas" in (folder / "steps.html").read_text()
    summary = pd.read_csv(folder / "summary.csv")
    assert memory_timeline.draw(summary).axes
    assert len(summary) < 1000
    frames = {"counts", "held_by_request", "refusals", "requests", "steps", "traces"}
    assert {p.stem for p in folder.glob("*.parquet")} == frames


def test_the_papers_counts_are_of_their_own_systems(summary_of):
    systems = "systems=[paged,vattention-64kb,vattention-2mb]"
    counted = summary_of("memory_timeline", systems).set_index("figure")
    counted = counted[counted.evidence == "exact"]
    assert dict(zip(counted.index, counted.system, strict=True)) == {
        "s4.3": "vLLM", "s6.1.1": "vAttention", "memory_timeline": "vattention-64KB/vllm2023",
    }  # fmt: skip
    assert counted.value["s4.3"] == 0
    assert counted.value["s6.1.1"] == 1
    for other in (["trace.num_requests=4"], ["device=a100-80gb", "engine=lean"]):
        assert set(summary_of("memory_timeline", systems, *other).paper) == {"kvarena"}


def test_a_device_that_the_weights_do_not_fit_is_refused(finished):
    with pytest.raises(UserError, match=r"weights do not fit, 23\.9 GiB"):
        finished("memory_timeline", "engine=lean", "device=a100-40gb", "device.memory_gib=4", "params.pool_bytes=null")
    with pytest.raises(UserError, match=r"do not fit its 39\.4"):
        finished("memory_timeline", "params.pool_bytes=20000000000")


def test_what_cannot_be_drawn():
    run = compose_run(*SMALL, "systems=[fastertransformer]", "params.pool_bytes=1073741824")
    with pytest.raises(UserError, match="cannot be told apart by request"):
        film(run, run.systems[0], workload_of(run))
    with pytest.raises(UserError, match="memory_timeline stops a replay at every step"):
        compose_run(*SMALL, "clock=measured", "device=cpu")
