"""Conversation ids are not believed: who has none is alone, and a turn holds what was said before it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.arrival import ArrivalConfig

HEADER = "conversation_id,prompt_tokens,output_tokens"


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., str]:
    """The path of a CSV."""

    def write(*rows: str, header: str = HEADER) -> str:
        path = tmp_path / "chats.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return str(path)

    return write


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """The path of JSON lines of one-token answers, by (fields, prompt)."""

    def write(*turns: tuple[dict[str, object], int]) -> str:
        path = tmp_path / "chats.jsonl"
        records = [{"prompt_tokens": prompt, "output_tokens": 1, **fields} for fields, prompt in turns]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def conversations(path: str, **keys: object) -> list[int]:
    found = load_trace(TraceConfig(path=path, **keys)).conversation_ids
    assert found is not None
    return found.tolist()


def test_an_empty_id_is_a_conversation_of_its_own(csv: Callable, lines: Callable) -> None:
    assert conversations(csv("a,10,1", ",10,1", "  ,11,1", ",5,1", "a,11,1")) == [0, 1, 2, 3, 0]
    name = "conversation_id"
    turns = [({name: "a"}, 10), ({name: ""}, 10), ({name: None}, 9), ({}, 8), ({name: " \t"}, 7), ({name: "a"}, 11)]
    assert conversations(lines(*turns)) == [0, 1, 2, 3, 4, 0]
    nothing = [({name: float("nan")}, 3), ({name: float("nan")}, 2)]
    assert conversations(lines(*nothing)) == [0, 1]


def test_ids_that_look_alike_are_none(csv: Callable, lines: Callable) -> None:
    ids = ("1", "01", "1.0", "1e0", "NaN", "nan", "None", "True", str(2**53), str(2**53 + 1))
    assert conversations(csv(*(f"{each},9,1" for each in ids))) == [*range(10)]
    values = (1, "1", 1.0, "1.0", "01", "NaN", 2**53, 2**53 + 1, 2**70)
    assert conversations(lines(*(({"conversation_id": each}, 9) for each in values))) == [*range(9)]


@pytest.mark.parametrize("value", [[1], {"a": 1}, True])
def test_what_is_no_id(lines: Callable, value: object) -> None:
    path = lines(({"conversation_id": "a"}, 5), ({"conversation_id": value}, 5))
    with pytest.raises(UserError, match="record 2: conversation_id is"):
        load_trace(TraceConfig(path=path))


def test_a_turn_holds_what_was_said_before_it(csv: Callable) -> None:
    path = csv("a,10,5", "b,3,1", "a,14,5", "a,15,5", "b,4,1", "a,19,1", "a,20,1")
    with pytest.raises(UserError, match=r"record 3: its prompt of 14 tokens does not hold the 15"):
        load_trace(TraceConfig(path=path))
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert trace.prompt_tokens.tolist() == [10, 3, 15, 4, 20], "a turn that is left out has not been said"
    assert (trace.provenance["read"], trace.provenance["malformed"]) == (7, 2)


def test_turns_follow_one_another_as_they_arrive(csv: Callable) -> None:
    header = f"{HEADER},arrival_s"
    assert len(load_trace(TraceConfig(path=csv("a,20,5,9", "a,10,5,1", "a,15,5,4", header=header)))) == 3
    with pytest.raises(UserError, match="record 2"):
        load_trace(TraceConfig(path=csv("a,10,5,1", "a,15,5,9", "a,20,5,4", header=header)))


def test_a_turn_of_another_fault_has_not_been_said(csv: Callable) -> None:
    trace = load_trace(TraceConfig(path=csv("a,10,5", "a,100,0", "a,15,5"), on_bad_record="skip"))
    assert (trace.prompt_tokens.tolist(), trace.provenance["malformed"]) == ([10, 15], 1)


def test_turns_of_many_at_once_keep_their_order(csv: Callable) -> None:
    """Also where a file has them as they came, and not conversation by conversation."""
    config = TraceConfig(path=csv("a,10,1", "b,20,1", "a,11,1", "b,21,1", "a,12,1"), new_conversation=0.5, seed=3)
    workload = make_workload(config, ArrivalConfig("all_at_once"))
    assert workload.conversation_ids is not None
    for number in (0, 1):
        prompts = workload.prompt_tokens[workload.conversation_ids == number].tolist()
        assert prompts == sorted(prompts)
        assert len(prompts) == (3, 2)[number]


def test_strangers_share_nothing(ran: Callable, csv: Callable, lines: Callable) -> None:
    """In CSV as in JSON lines; and a conversation is found again in both."""
    systems = ("systems=[paged]", "params.capacities_gb=[1]", "params.repeats=1")
    prompts = (640, 656, 800, 1600)
    for talk, expected in (("", 0), ("a", 100 * (640 + 656 + 800) / sum(prompts))):
        rows = csv(*(f"{talk},{prompt},1,{i}" for i, prompt in enumerate(prompts)), header=f"{HEADER},arrival_s")
        turns = [({"conversation_id": talk, "arrival_s": i}, prompt) for i, prompt in enumerate(prompts)]
        for path in (rows, lines(*turns)):
            done = ran("prefix_cache", f"trace.path={path}", "trace.block_tokens=16", *systems)
            for quantity in ("hit_ratio_unlimited", "reused_share:with_cache"):
                assert done.value(quantity) == {"paged/lean": pytest.approx(expected)}


def test_turns_come_as_they_are_recorded(lines: Callable) -> None:
    """Also where an experiment would begin new conversations among those that go on."""
    turns = [({"conversation_id": i % 3, "arrival_s": 9 - i}, 30 - i) for i in range(9)]
    config = TraceConfig(path=lines(*turns), new_conversation=0.5)
    workload = make_workload(config, ArrivalConfig("recorded"))
    assert workload.prompt_tokens.tolist() == [*range(22, 31)]


def test_a_file_that_is_repeated_is_said_by_others(csv: Callable) -> None:
    trace = load_trace(TraceConfig(path=csv("a,10,1", "b,20,1", "a,11,1")), num_requests=7)
    assert trace.conversation_ids is not None
    assert trace.conversation_ids.tolist() == [0, 1, 0, 2, 3, 2, 4]
