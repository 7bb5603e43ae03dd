"""Requests that a system refuses at arrival are counted in every experiment that serves, and said beside numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.carry_out import resolved_in, summary_of
from kvarena.harness.record.record import read_frames

TIMED = "prompt_tokens,output_tokens,arrival_s"
SOME = ("1500,100,0", "100,20,0.1", "1600,100,0.2", "100,20,0.3", "1400,300,0.4", "100,20,0.5")  # of 120 and 1,600 up
OPT_TOKEN = 819_200  # bytes of K/V of OPT-13B
YI_TOKEN = 65_536
ROOM = f"params.pool_bytes={1024 * OPT_TOKEN}"  # for 1,024 tokens


def test_memory_waste_says_that_half_of_the_requests_do_not_fit(ran: Callable, own: Callable) -> None:
    path = own(*SOME, header=TIMED)
    done = ran("memory_waste", "systems=[paged,vattention]", f"trace.path={path}", ROOM, "params.window_s=[0,2]")
    assert done.value("refused") == {"paged/vllm2023": 3, "vattention/vllm2023": 3}
    assert set(done.value("refused_of").values()) == {6}
    assert "paged/vllm2023 refuses 3 of 6 requests; the first: request 0: 1600 tokens" in done.err
    for said in (done.out, done.words):
        assert "paged/vllm2023 3 of 6, vattention/vllm2023 3 of 6" in said
    folder = done.finish()
    assert len(json.loads((folder / "provenance.json").read_text())["refusals"]) == 2
    again = summary_of(resolved_in(folder), read_frames(folder))
    pd.testing.assert_frame_equal(again, done.summary, obj="what the frames alone say")


def test_systems_that_served_other_requests_are_not_compared_without_a_word(ran: Callable, own: Callable) -> None:
    path = own("1500,100,0", "100,20,0.1", "1000,20,0.2", header=TIMED)
    room = f"params.pool_bytes={1700 * OPT_TOKEN}"  # Orca rounds 1,600 up to 2,048, which it has not
    done = ran("memory_waste", "systems=[orca-oracle,paged]", f"trace.path={path}", room, "params.window_s=[0,9]")
    assert done.value("refused") == {"orca_oracle/vllm2023": 1, "paged/vllm2023": 0}
    said = "orca_oracle/vllm2023 1 of 3, paged/vllm2023 none; not the same requests are compared"
    assert said in done.words
    assert said in done.out


def test_a_system_that_refuses_nobody_has_its_row_and_no_word(ran: Callable, own: Callable) -> None:
    done = ran(
        "memory_waste", "systems=[paged]", f"trace.path={own('100,20,0', header=TIMED)}", "params.window_s=[0,9]"
    )
    assert done.value("refused") == {"paged/vllm2023": 0}
    assert " refuses " not in done.err
    assert "refused at arrival" not in done.out + done.words


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("offline_throughput", ("systems=[paged-fa2]", "trace.num_requests=3")),
        ("online_latency", ("systems=[paged-fa2]", "params.rates={others: [0.5]}", "trace.num_requests=3")),
        ("memory_timeline", ("systems=[paged]", "params.samples=5", "trace.max_tokens=2048", "trace.num_requests=3")),
        ("granularity", ("systems=[paged]", "params.window_s=[0,99]", "params.block_sizes=[16,32]")),
    ],
)
def test_it_is_every_experiments(experiment: str, overrides: tuple[str, ...], ran: Callable, own: Callable) -> None:
    path, room = own("1500,20,0", "90,4,0.1", "90,4,0.2", header=TIMED), f"params.pool_bytes={1024 * YI_TOKEN}"
    done = ran(experiment, f"trace.path={path}", "model=yi-6b", "engine=lean", room, *overrides)
    assert set(done.value("refused").values()) == {1}
    assert "refuses 1 of 3 requests" in done.err
    assert "1 of 3" in done.words


def test_what_counts_without_serving_counts_whom_no_pool_holds(ran: Callable, tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 0, "input_length": length, "output_length": 4, "hash_ids": list(range(-(-length // 512)))}
        for length in (600, 2000, 700)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    room = f"params.capacities_gb=[{1000 * 131_072 / 1e9}]"  # 1,000 tokens of Llama-3-8B
    done = ran("prefix_cache", "systems=[paged]", f"trace.path={path}", "trace.format=mooncake", room)
    [refused] = [value for label, value in done.value("refused").items() if "counted in" in label]
    assert refused == 1


def test_who_refuses_all_is_named(ran: Callable, own: Callable) -> None:
    with pytest.raises(UserError, match="refuses all 1 requests"):
        ran("memory_waste", "systems=[paged]", f"trace.path={own('1500,100,0', header=TIMED)}", ROOM)


def test_the_replay_that_refuses_most_counts(ran: Callable, own: Callable) -> None:
    """Rates differ in how many requests arrive, and so in how many are refused."""
    path = own(*["1500,100", "90,4"] * 40)
    panel = (
        "{fig12a: {model: opt-13b, device: a100-40gb, trace: sharegpt, duration_s: 4, rates: {others: [2.0, 16.0]}}}"
    )
    done = ran("serving_latency", "systems=[paged]", "params.crossing=[]", f"params.panels={panel}", ROOM,
               f"trace.path={path}", "params.seeds=[0]")  # fmt: skip
    by_rate = done.summary[done.summary.quantity == "refused_vs_rate"].value
    assert by_rate.nunique() > 1
    assert set(done.value("refused").values()) == {by_rate.max()}, "out of sample too"
    assert set(done.value("refused:smallest").values()) == {by_rate.min()}
