"""A file's block size is the file's: what counts and what serves find the same; a prompt that no model computes is
dropped and counted.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.requests.request_list import spans_of_prompts
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig
from kvarena.harness.trace.arrival import ArrivalConfig

SMALL = ("systems=[paged]", "params.repeats=1", "params.capacities_gb=[1]")


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """The path of a file in Mooncake's format: every second prompt goes on where the one before it ended."""

    def write(block: int, *prompts: int) -> str:
        path = tmp_path / f"blocks_{block}.jsonl"
        records, ids = list[dict[str, object]](), list[int]()
        for number, prompt in enumerate(prompts):
            count = -(-prompt // block)
            shared = ids[: prompts[number - 1] // block] if number % 2 else []  # the last block is full, or another
            ids = [*shared, *(10_000 * number + i for i in range(count))][:count]
            record = {"timestamp": 300 * number, "input_length": prompt, "output_length": 4, "hash_ids": ids}
            records.append(record)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("block", "keys"),
    [
        (16, ["trace.time_unit=s"]),  # by the ids' number
        (16, ["trace.format=bailian"]),
        (512, []),
        (64, ["trace.block_tokens=64", "trace.time_unit=ms"]),
    ],
)
def test_what_is_counted_is_served(ran: Callable, lines: Callable, block: int, keys: list[str]) -> None:
    """Half of what a block-by-block cache may find: in pairs of prompts, the second begins with all of the first."""
    path = lines(block, 1024, 2048, 1024, 2048)
    done = ran("prefix_cache", f"trace.path={path}", *keys, *SMALL)
    assert done.value("hit_ratio_unlimited") == {"paged/lean": pytest.approx(100 * 2048 / 6144)}
    assert done.value("hit_ratio_vs_capacity") == done.value("hit_ratio_unlimited")
    assert done.value("reused_share:with_cache") == {"paged/lean": pytest.approx(100 * 2048 / 6144)}
    assert done.value("blocks") == {"trace": 6144 // block}


def test_modelled_prompts_may_be_longer_than_the_models(ran: Callable, lines: Callable) -> None:
    """All of them: positions are stretched, unless a context is asked for, which leaves them out."""
    path = lines(512, 20_000, 30_000)
    done = ran("prefix_cache", f"trace.path={path}", "systems=[paged]", "params.capacities_gb=[100]")
    assert done.value("hit_ratio_unlimited") == {"paged/lean": pytest.approx(100 * 39 * 512 / 50_000)}
    assert done.value("prefill_tokens:without_cache") == {"paged/lean": 50_000}
    with pytest.raises(UserError, match="no request is left"):
        refused("prefix_cache", f"trace.path={path}", "params.context=16384")


def test_spans_are_the_files_blocks(lines: Callable) -> None:
    for block, said in ((16, None), (512, None), (48, 48)):
        config = TraceConfig(path=lines(block, 600, 1100), keep_hash_ids=True, block_tokens=said, time_unit="ms")
        first, second = spans_of_prompts(make_workload(config, ArrivalConfig("all_at_once")))
        assert [span.end - span.start for span in first] == [block] * (600 // block) + [600 % block] * (600 % block > 0)
        assert [a.source for a in first[: 600 // block]] == [b.source for b in second[: 600 // block]]


def test_params_block_tokens_are_a_chats(lines: Callable) -> None:
    with pytest.raises(UserError, match=r"params\.block_tokens: nothing reads it.*trace\.block_tokens"):
        refused("prefix_cache", f"trace.path={lines(512, 1024, 2048)}", "params.block_tokens=16")


def refused(experiment: str, *overrides: str) -> None:
    from kvarena.experiments.command.carry_out import carry_out
    from kvarena.harness.record.record import Recorder

    run = compose_run(f"experiment={experiment}", *overrides)
    carry_out(run, Recorder(run.experiment, run.plain()))


MEASURED = ("clock=measured", "device=cpu", "threads=1", "systems=[paged]", "params.repeats=1",
            "params.capacities_gb=[0.05]", "trace.num_requests=4", "params.serve_requests=4")  # fmt: skip


def test_measured_the_context_is_the_models(ran: Callable, lines: Callable) -> None:
    """Prompts beyond the model's positions are dropped and counted, whatever their ids; the others are computed."""
    path = lines(512, 600, 1100, 40_000, 50_000, 600, 700)
    done = ran("prefix_cache", f"trace.path={path}", *MEASURED)
    assert "6 read, 2 over 2048 dropped" in done.err
    assert done.value("prefill_tokens:without_cache")["paged/numba"] == 600 + 1100 + 600 + 700
    found = 512 + 512  # of blocks that are full in the prompt before
    assert done.value("prefill_tokens:with_cache")["paged/numba"] == 3000 - found
    assert done.value("hit_ratio_unlimited")["paged/numba"] == pytest.approx(100 * found / 3000)


def test_measured_a_longer_context_is_refused(lines: Callable) -> None:
    with pytest.raises(UserError, match=r"params\.context: nothing reads it"):
        refused("prefix_cache", f"trace.path={lines(512, 600, 1100)}", *MEASURED, "params.context=100000")
    with pytest.raises(UserError, match="no request is left"):
        refused("prefix_cache", f"trace.path={lines(512, 40_000)}", *MEASURED)
