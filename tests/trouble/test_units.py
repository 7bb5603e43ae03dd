"""Units are not assumed: a file's stamps and the blocks of its ids are what its format, its records or the user say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.arrival import ArrivalConfig

BAILIAN = (
    {"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 64, "output_length": 8, "type": "text",
     "turn": 1, "hash_ids": [10, 11, 12, 13]},
    {"chat_id": 160, "parent_chat_id": 159, "timestamp": 121.114, "input_length": 96, "output_length": 8,
     "type": "text", "turn": 2, "hash_ids": [10, 11, 12, 13, 14, 15]},
)  # fmt: skip
MOONCAKE = (
    {"timestamp": 0, "input_length": 1024, "output_length": 8, "hash_ids": [1, 2]},
    {"timestamp": 3000, "input_length": 1025, "output_length": 8, "hash_ids": [1, 2, 3]},
)
LENGTHS = (
    {"timestamp": 10, "input_length": 256, "output_length": 8},
    {"timestamp": 20, "input_length": 512, "output_length": 8},
)


def without(records: tuple[dict[str, object], ...], *fields: str) -> list[dict[str, object]]:
    return [{key: value for key, value in record.items() if key not in fields} for record in records]


def at(records: tuple[dict[str, object], ...], *stamps: float) -> list[dict[str, object]]:
    return [record | {"timestamp": stamp} for record, stamp in zip(records, stamps, strict=True)]


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., str]:
    """The path of a file of JSON lines."""

    def write(records: list[dict[str, object]]) -> str:
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


NO_CHATS = without(BAILIAN, "chat_id", "parent_chat_id", "type", "turn")


@pytest.mark.parametrize(
    ("records", "keys", "format_name", "arrivals", "block", "assumed"),
    [
        (BAILIAN, {}, "bailian", [61.114, 121.114], 16, 0),
        (NO_CHATS, {}, "mooncake", [61.114, 121.114], 16, 2),
        (NO_CHATS, {"format": "bailian"}, "bailian", [61.114, 121.114], 16, 0),
        (NO_CHATS, {"time_unit": "s"}, "mooncake", [61.114, 121.114], 16, 1),
        (BAILIAN, {"time_unit": "ms"}, "bailian", [0.061114, 0.121114], 16, 0),
        (MOONCAKE, {}, "mooncake", [0, 3], 512, 1),
        (MOONCAKE, {"format": "mooncake"}, "mooncake", [0, 3], 512, 0),
        (MOONCAKE, {"time_unit": "us"}, "mooncake", [0, 0.003], 512, 0),
        (at(MOONCAKE, 0.25, 3.5), {}, "mooncake", [0.25, 3.5], 512, 1),
        (LENGTHS, {"format": "mooncake"}, "mooncake", [0.01, 0.02], None, 0),
        (LENGTHS, {"format": "guidellm"}, "guidellm", [0, 10], None, 0),
        (LENGTHS, {"time_unit": "ns"}, "guidellm", [0, 1e-8], None, 0),
        (at(LENGTHS, 1234500.25, 1234500.75), {}, "guidellm", [0, 0.5], None, 1),
        (at(LENGTHS, 0, 0), {}, "guidellm", [0, 0], None, 0),
    ],
)  # fmt: skip
def test_units(lines: Callable, records: list, keys: dict, format_name: str, arrivals: list, block: int,
               assumed: int) -> None:  # fmt: skip
    trace = load_trace(TraceConfig(path=lines(list(records)), keep_hash_ids=None, **keys))
    assert trace.provenance["format"] == format_name
    assert trace.arrival_s.tolist() == pytest.approx(arrivals, abs=1e-12)
    assert (trace.hash_ids is None) == (block is None)
    assert block is None or trace.block_tokens == block
    assert len(trace.provenance["assumed"]) == assumed, "a guess is said, and nothing else"


@pytest.mark.parametrize(
    ("records", "keys"),
    [
        (LENGTHS, {}),  # Mooncake's without ids, or GuideLLM's
        (at(MOONCAKE, 0.25, 3.5), {"format": "mooncake"}),
        (at(BAILIAN, 61, 121), {"format": "mooncake", "block_tokens": 512}),
        (without(at(BAILIAN, 61, 121), "chat_id"), {}),
    ],
)
def test_what_cannot_be_told_is_asked_for(lines: Callable, records: list, keys: dict) -> None:
    path = lines(list(records))
    if keys.get("block_tokens"):  # then it is the ids that do not fit
        with pytest.raises(UserError, match=r"record 1: 4 hash_ids"):
            load_trace(TraceConfig(path=path, keep_hash_ids=True, **keys))
        return
    with pytest.raises(UserError, match=r"trace\.time_unit"):
        load_trace(TraceConfig(path=path, **keys))
    assert len(load_trace(TraceConfig(path=path, **{**keys, "time_unit": "s"}))) == 2


def test_seconds_since_1970_are_no_milliseconds(lines: Callable) -> None:
    """Whole ones, beside ids of 512 tokens: else 3 s were 3 ms, after 19 days without a request."""
    path = lines(at(MOONCAKE, 1_700_000_000, 1_700_000_003))
    with pytest.raises(UserError, match=r"trace\.time_unit"):
        load_trace(TraceConfig(path=path))
    assert load_trace(TraceConfig(path=path, format="guidellm")).arrival_s.tolist() == [0, 3]


def test_what_an_id_stands_for_may_have_to_be_said(lines: Callable) -> None:
    """Ids beside fields of a format that has none, and prompts that have one id whatever it stands for."""
    path = lines([{"prompt_tokens": 7, "output_tokens": 1, "hash_ids": [1]}])
    with pytest.raises(UserError, match=r"trace\.block_tokens"):
        load_trace(TraceConfig(path=path, keep_hash_ids=True))
    assert load_trace(TraceConfig(path=path, keep_hash_ids=True, block_tokens=64)).block_tokens == 64


@pytest.mark.parametrize("keys", [{"time_unit": "min"}, {"block_tokens": 0}])
def test_units_that_there_are_not(lines: Callable, keys: dict) -> None:
    with pytest.raises(UserError, match=f"trace.{next(iter(keys))}="):
        load_trace(TraceConfig(path=lines(list(MOONCAKE)), **keys))


@pytest.mark.parametrize("keep", [True, None])
def test_a_prompt_with_too_few_ids_or_too_many_is_bad(lines: Callable, keep: bool | None) -> None:
    records = [*MOONCAKE, MOONCAKE[0] | {"input_length": 2000}, MOONCAKE[0] | {"input_length": 512}, MOONCAKE[1]]
    path = lines(records)
    with pytest.raises(UserError, match="record 3: 2 hash_ids, where 2000 tokens are 4 blocks of 512"):
        load_trace(TraceConfig(path=path, keep_hash_ids=keep))
    trace = load_trace(TraceConfig(path=path, keep_hash_ids=keep, on_bad_record="skip"))
    assert (trace.provenance["read"], trace.provenance["malformed"], len(trace)) == (5, 2, 3)
    assert len(load_trace(TraceConfig(path=path))) == 5, "where no ids are kept, none is read"


FORMATS = {
    "azure 2023": ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10",
                   "2023-11-16 18:17:04.0319600,3180,8", 0.052),
    "azure 2024": ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-12 00:00:00.500000+00:00,4808,10",
                   "2024-05-12 00:00:02+00:00,3180,8", 1.5),
    "burstgpt": ("burstgpt", "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
                 "Log Type", "19440110.0,1722ac82,43,GPT-4,4808,10,4818,Conversation log",
                 "19440161.0,,2,ChatGPT,3180,8,3188,API log", 51),
    "burstgpt 1": ("burstgpt", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
                   "5,ChatGPT,4808,10,4818,API log", "45,GPT-4,3180,8,3188,API log", 40),
    "vidur": ("vidur", "arrived_at,num_prefill_tokens,num_decode_tokens", "0.0,4808,10", "4.314579,3180,8", 4.314579),
    "vidur lengths": ("vidur", "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio", "4808,10,4818,480.8",
                      "3180,8,3188,397.5", None),
    "splitwise": ("splitwise", "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
                  "token_size", "0,2,0,0.0,1,4808,10", "1,2,0,0.5,1,3180,8", 0.5),
    "splitwise lengths": ("splitwise", "prompt_size,token_size", "4808,10", "3180,8", None),
    "guidellm": ("guidellm", "prompt_tokens_count,output_tokens_count", "4808,10", "3180,8", None),
    "guidellm trace": ("guidellm", "timestamp,input_length,output_length", "1234500.5,4808,10", "1234501.25,3180,8",
                       0.75),
    "lengths": ("lengths", "prompt_tokens,output_tokens", "4808,10", "3180,8", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("as_json", [False, True])
def test_known_formats_in_csv_and_json_lines(tmp_path: Path, name: str, named: bool, as_json: bool) -> None:
    format_name, header, *rows, second = FORMATS[name]
    path = tmp_path / "trace"
    path.write_text("\n".join([header, *rows]) + "\n")
    if as_json:
        records = [dict(zip(header.split(","), map(_number, row.split(",")), strict=True)) for row in rows]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    trace = load_trace(TraceConfig(path=str(path), format=format_name if named else None))
    assert trace.provenance["format"] == format_name
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4808, 3180], [10, 8])
    assert second is None or trace.arrival_s.tolist() == pytest.approx([0, second])


def _number(text: str) -> str | float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def test_guidellms_prompts_are_text(tmp_path: Path, tokenizer: str) -> None:
    records = [{"prompt": "a b c", "output_tokens_count": 5}, {"prompt": "d", "output_tokens_count": 0},
               {"prompt": "e", "output_tokens_count": "7"}]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    trace = load_trace(TraceConfig(path=str(path), tokenizer=tokenizer, on_bad_record="skip"))
    assert trace.provenance["format"] == "guidellm"
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4], [5])
    assert trace.provenance["malformed"] == 2


@pytest.mark.parametrize("keys", [{"time_unit": "ms"}, {"block_tokens": 16}])
def test_units_of_what_a_file_does_not_state(tmp_path: Path, keys: dict) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n1,2\n")
    with pytest.raises(UserError, match=f"trace.{next(iter(keys))}="):
        load_trace(TraceConfig(path=str(path), **keys))


def test_requests_that_failed_are_no_malformed_records(tmp_path: Path) -> None:
    """BurstGPT's: no token came back."""
    path = tmp_path / "burst.csv"
    rows = ["5,GPT-4,100,10,110,API log", "6,GPT-4,100,0,100,API log", "7,GPT-4,0,0,0,API log", "8,GPT-4,x,0,0,API log"]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *rows]) + "\n")
    config = TraceConfig(path=str(path), on_bad_record="skip")
    account = make_workload(config, ArrivalConfig("recorded")).account
    assert account is not None
    assert (account.read, account.kept, sum(account.dropped.values())) == (4, 1, 3)
    assert account.dropped["malformed"] == 2, "a prompt has at least one token"
    assert "1 failed" in str(account)


def test_numbers_in_a_column_of_dates_need_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1999,10,1\n2000,10,1\n")
    with pytest.raises(UserError, match=r"record 1: arrival is '1999', not a date"):
        load_trace(TraceConfig(path=str(path)))
    assert load_trace(TraceConfig(path=str(path), time_unit="ms")).arrival_s.tolist() == [0, 0.001]


def test_a_guess_is_said(lines: Callable) -> None:
    account = make_workload(TraceConfig(path=lines(NO_CHATS)), ArrivalConfig("recorded")).account
    assert account is not None
    assert "trace.time_unit" in str(account)
    assert "trace.block_tokens" in str(account)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("timestamp,prompt_tokens_count,output_tokens_count", "{},10,5"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", "{},10,5"),
        ("arrival_timestamp,prompt_size,token_size", "{},10,5"),
    ],
)
def test_seconds_after_the_year_5000_are_another_unit(tmp_path: Path, header: str, row: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text("\n".join([header, *(row.format(1748888888250 + 500 * i) for i in range(4))]) + "\n")
    with pytest.raises(UserError, match=r"trace\.time_unit"):
        load_trace(TraceConfig(path=str(path)))
