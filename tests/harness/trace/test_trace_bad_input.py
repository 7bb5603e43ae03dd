"""A malformed record stops the load, or is counted and reported: file, record, reason."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.errors import UserError
from kvarena.harness.trace import TraceConfig, load_trace

HEADER = "prompt_tokens,output_tokens\n"


@pytest.fixture
def write(tmp_path):
    def file(content, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return file


BAD_ROWS = [
    (",5", "prompt length is empty"),
    ("5,", "output length is empty"),
    ("-3,5", "prompt length is -3, below 1"),
    ("5,0", "output length is 0, below 1"),
    ("five,5", "prompt length is 'five', not a number"),
    ("5,nan", "output length is 'nan', not a number"),
    ("2.5,5", "prompt length is 2.5, not a whole number"),
    ("1e12,5", "prompt length is 1000000000000, beyond 2147483647"),
    ("5", "1 fields, the header has 2"),
    ("5,6,7", "3 fields, the header has 2"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_stops_the_load(write, row, reason):
    path = write(f"{HEADER}1,2\n{row}\n3,4\n")
    with pytest.raises(UserError) as error:
        load_trace(TraceConfig(path=path))
    assert f"{path}, record 2: {reason}" in str(error.value)
    assert "trace.on_bad_record=skip" in str(error.value)


def test_skipped_rows_are_counted_and_reported(write, caplog):
    path = write(HEADER + "1,2\n" + "".join(f"{row}\n" for row, _ in BAD_ROWS) + "3,4\n")
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert trace.prompt_tokens.tolist() == [1, 3]
    assert trace.provenance["read"] == len(BAD_ROWS) + 2
    assert trace.provenance["malformed"] == len(BAD_ROWS)
    assert len(trace.provenance["malformed_reasons"]) == 5
    assert f"skipped {len(BAD_ROWS)} malformed records" in caplog.text
    assert "and 5 more" in caplog.text


@pytest.mark.parametrize("stamp", ["", "soon", "-0.5", "inf", "1700000000"])
def test_a_bad_stamp(write, stamp):
    path = write(f"arrival_s,prompt_tokens,output_tokens\n0,1,1\n{stamp},1,1\n")
    with pytest.raises(UserError, match=rf"record 2: arrival is .*{stamp}.*, not"):
        load_trace(TraceConfig(path=path))


def test_a_bad_date(write):
    path = write("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,1\nyesterday,1,1\n")
    with pytest.raises(UserError, match="record 2: arrival is 'yesterday', not a date"):
        load_trace(TraceConfig(path=path))


def test_over_long_requests(write, caplog):
    path = write(f"{HEADER}100,28\n100,29\n20,5\n")
    with pytest.raises(UserError, match=r"record 2: .* 129 .* 128.*fits_context"):
        load_trace(TraceConfig(path=path, filter="none"), max_tokens=128)
    trace = load_trace(TraceConfig(path=path, filter="none", on_bad_record="skip"), max_tokens=128)
    assert (len(trace), trace.provenance["over_long"], trace.provenance["filtered"]) == (2, 1, 0)
    assert "record 2" in caplog.text
    trace = load_trace(TraceConfig(path=path, filter="fits_context"), max_tokens=128)
    assert (len(trace), trace.provenance["over_long"], trace.provenance["filtered"]) == (2, 0, 1)


GOOD = {"prompt_tokens": 1, "output_tokens": 2}


@pytest.mark.parametrize(
    ("text", "record", "reason"),
    [
        (json.dumps([GOOD, GOOD])[:-9], 2, "broken or truncated JSON"),
        (json.dumps([GOOD, GOOD])[:-1], 3, "broken or truncated JSON"),
        (json.dumps([GOOD, GOOD]) + "]", 3, "broken or truncated JSON"),
        ("[" + json.dumps(GOOD) + ",]", 2, "broken or truncated JSON"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9] + "\n" + json.dumps(GOOD), 2, "not JSON"),
        (json.dumps([GOOD, 5]), 2, "5 is not an object with fields"),
        (json.dumps([GOOD, {"prompt_tokens": 1}]), 2, "no field output_tokens"),
        (json.dumps([GOOD, {**GOOD, "output_tokens": True}]), 2, "output_tokens is True, not a number"),
        (json.dumps([GOOD, {**GOOD, "output_tokens": "7"}]), 2, "output_tokens is '7', not a number"),
        (json.dumps([GOOD, {**GOOD, "output_tokens": None}]), 2, "output length is empty"),
        (json.dumps([GOOD, {**GOOD, "output_tokens": 10**400}]), 2, "output_tokens is 1000"),
    ],
)
def test_bad_json(write, text, record, reason):
    path = write(text, "trace.json")
    with pytest.raises(UserError) as error:
        load_trace(TraceConfig(path=path))
    assert f"{path}, record {record}: {reason}" in str(error.value)
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert trace.provenance["malformed"] == 1
    assert set(trace.output_tokens) == {2}


@pytest.mark.parametrize("malformed", [{"output_tokens": 0, "arrival_s": 3}, {"arrival_s": -1}, {"arrival_s": 1e9}])
def test_a_malformed_record_with_a_time_does_not_ask_the_others_for_one(write, malformed):
    path = write(json.dumps([GOOD, GOOD | malformed, GOOD]), "trace.json")
    with pytest.raises(UserError, match="record 2: "):
        load_trace(TraceConfig(path=path))
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert (len(trace), trace.provenance["malformed"], trace.arrival_s) == (2, 1, None)


def test_a_well_formed_record_with_a_time_asks_the_others_for_one(write):
    path = write(json.dumps([GOOD, GOOD | {"arrival_s": 3}, GOOD]), "trace.json")
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert (trace.provenance["malformed"], trace.arrival_s.tolist()) == (2, [3])


def test_the_first_of_all_bad_records_is_named_whenever_it_is_seen(write):
    rows = [GOOD, GOOD | {"output_tokens": 0}, GOOD | {"output_tokens": "x"}]
    path = write("".join(f"{json.dumps(row)}\n" for row in rows) + "{,\n")
    with pytest.raises(UserError, match="record 2: output length is 0"):
        load_trace(TraceConfig(path=path))
    reasons = load_trace(TraceConfig(path=path, on_bad_record="skip")).provenance["malformed_reasons"]
    assert [reason[:8] for reason in reasons] == ["record 2", "record 3", "record 4"]


@pytest.mark.parametrize("far", ["0023-11-16", "1023-11-16", "2023-01-16", "2024-11-16", "9023-11-16"])
def test_a_date_that_is_far_off_costs_its_own_record(write, far):
    rows = [f"{far} 18:15:45,1,1", "2023-11-16 18:15:46,1,1", "2023-11-16 18:15:48,1,1"]
    path = write("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert (trace.provenance["malformed"], trace.arrival_s.tolist()) == (1, [0, 2])


@pytest.mark.parametrize("far", ["0", "5e12"])
def test_a_clock_that_is_far_off_costs_its_own_record(write, far):
    rows = [f"{far},1,1", "1700000000.5,1,1", "1700000002.5,1,1"]
    path = write("\n".join(["timestamp,prompt_tokens_count,output_tokens_count", *rows]))
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert (trace.provenance["malformed"], trace.arrival_s.tolist()) == (1, [0, 2])


def test_dates_count_from_the_first_well_formed_record(write):
    rows = "1970-01-01,0,1\n2023-11-16 18:15:46,1,1\n2023-11-16 18:15:48,1,1\n"
    path = write(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    trace = load_trace(TraceConfig(path=path, on_bad_record="skip"))
    assert (trace.provenance["malformed"], trace.arrival_s.tolist()) == (1, [0, 2])


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        ("hello", "conversations is 'hello', not a list of turns"),
        ([{"from": "human"}, {"from": "gpt", "value": "x"}], "no field value"),
        ([{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}], "value is 3, not text"),
        ([{"value": "x"}], "no field from"),
    ],
)
def test_bad_conversations(write, conversations, reason):
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = write(json.dumps([good, {"conversations": conversations}]), "sharegpt.json")
    with pytest.raises(UserError) as error:
        load_trace(TraceConfig(path=path, tokenizer="unused"))
    assert f"{path}, record 2: {reason}" in str(error.value)


def test_hash_ids_that_are_none(write):
    path = write('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0, "1"]}', "m.jsonl")
    assert len(load_trace(TraceConfig(path=path))) == 1
    with pytest.raises(UserError, match=r"record 1: hash_ids"):
        load_trace(TraceConfig(path=path, keep_hash_ids=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("[]", "holds no record"),
        (HEADER, "holds no record"),
        ("a,b\n1,2\n", r"its fields \(a, b\) fit no format. Needed are: sharegpt: conversations; alpaca:"),
        ('{"question": {}}', r"its fields \(question\) fit no format"),
        ("prompt_tokens,prompt_tokens,output_tokens\n1,2,3\n", "column prompt_tokens stands twice"),
        ("instruction,output\n1,2\n", "alpaca is read from JSON, not from CSV"),
        (HEADER.encode() + b"1,\xff\n", "record 1: byte 0xff is not UTF-8"),
    ],
)
def test_files_of_no_use(write, content, message):
    with pytest.raises(UserError, match=message):
        load_trace(TraceConfig(path=write(content)))


def test_a_format_that_does_not_fit(write):
    path = write(f"{HEADER}1,2\n")
    with pytest.raises(UserError, match=r"azure: ContextTokens"):
        load_trace(TraceConfig(path=path, format="azure"))
    with pytest.raises(UserError, match=r"trace.format=csv.* sharegpt, alpaca, wmt16, azure"):
        load_trace(TraceConfig(path=path, format="csv"))


def test_nothing_left_says_why(write):
    path = write(f"{HEADER}1,2\nx,2\n3000,1\n")
    with pytest.raises(UserError, match=r"read 3, malformed 1, without_request 0, filtered 2"):
        load_trace(TraceConfig(path=path, on_bad_record="skip", filter="vllm"))


@pytest.mark.parametrize("path", ["missing.json", "data/missing.csv", "/no/such/trace", "word"])
def test_a_missing_file(path):
    with pytest.raises(UserError, match=f"trace.path={path}: no such file"):
        load_trace(TraceConfig(path=path))


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_trace(TraceConfig(path=str(tmp_path)))


def test_an_unknown_policy(write):
    with pytest.raises(UserError, match=r"trace.on_bad_record=drop.* error, skip"):
        load_trace(TraceConfig(path=write(f"{HEADER}1,2\n"), on_bad_record="drop"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "arrival_s"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(JSON_VALUES | st.builds(dict, prompt_tokens=JSON_VALUES, output_tokens=JSON_VALUES), max_size=6)
)
def test_whatever_json_holds_every_record_is_accounted_for(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("fuzz") / "trace.json"
    path.write_text(json.dumps([GOOD, *records]))
    facts = load_trace(TraceConfig(path=str(path), on_bad_record="skip")).provenance
    assert facts["read"] == len(records) + 1 == facts["kept"] + facts["malformed"]


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.text(alphabet="0123456789.,-eEnan x\t", max_size=12), max_size=8))
def test_whatever_a_csv_holds_every_row_is_accounted_for(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "trace.csv"
    path.write_text(HEADER + "".join(f"{row}\n" for row in ["7,7", *rows]))
    facts = load_trace(TraceConfig(path=str(path), on_bad_record="skip")).provenance
    assert facts["read"] == 1 + sum(row.strip() != "" for row in rows) == facts["kept"] + facts["malformed"]
