"""Reading traces: every format, text with a tokenizer, the hub; what is counted, and in what order requests come."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.trace import TraceConfig, load_trace


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def turns(*speakers_and_texts):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in speakers_and_texts]}


CONVERSATIONS = [
    turns(("human", "one two three"), ("gpt", "four five"), ("human", "six"), ("gpt", "seven")),
    turns(("gpt", "a b c d"), ("human", "e f g h"), ("chatgpt", "i j k l m")),
    turns(("human", "nobody answers")),
    turns(),
    turns(("human", ""), ("gpt", "x")),
]


def test_sharegpt_takes_the_first_round(tmp_path, tokenizer):
    path = write(tmp_path / "sharegpt.json", CONVERSATIONS)
    trace = load_trace(TraceConfig(path=path, tokenizer=tokenizer))
    assert trace.prompt_tokens.tolist() == [4, 5, 1]  # words + BOS; an empty prompt is BOS alone
    assert trace.output_tokens.tolist() == [3, 6, 2]
    counts = {key: trace.provenance[key] for key in ("read", "malformed", "without_request", "filtered", "kept")}
    assert counts == {"read": 5, "malformed": 0, "without_request": 2, "filtered": 0, "kept": 3}
    assert trace.provenance["format"] == "sharegpt"


def test_sharegpt_as_vllm_takes_the_first_two_turns(tmp_path, tokenizer):
    path = write(tmp_path / "sharegpt.json", CONVERSATIONS)
    trace = load_trace(TraceConfig(path=path, tokenizer=tokenizer, filter="vllm"))
    assert trace.prompt_tokens.tolist() == [5]  # the assistant's turn of the second conversation
    assert trace.output_tokens.tolist() == [5]
    assert trace.provenance["filtered"] == 2


def test_alpaca_keeps_the_space_of_an_empty_input(tmp_path):
    from kvarena.harness.trace.formats import fitting
    from kvarena.harness.trace.recipes import recipe

    record = {"instruction": "Say it.", "input": "", "output": "It."}
    form = fitting(record, None)
    assert form.name == "alpaca"
    assert form.texts(record, recipe("none", None)) == ("Say it. ", "It.")
    assert form.texts({**record, "input": "now"}, recipe("none", None)) == ("Say it. now", "It.")


def test_alpaca_is_instruction_and_input(tmp_path, tokenizer):
    texts = [("Say it twice.", "now", "It. It."), ("Say nothing.", "", ""), ("Add", "1 2 3", "6")]
    records = [dict(zip(("instruction", "input", "output"), each, strict=True)) for each in texts]
    trace = load_trace(TraceConfig(path=write(tmp_path / "alpaca.json", records), tokenizer=tokenizer))
    assert trace.prompt_tokens.tolist() == [1 + len(f"{a} {b}".split()) for a, b, _ in texts]
    assert trace.output_tokens.tolist() == [1 + len(text.split()) for _, _, text in texts]
    assert (trace.provenance["format"], trace.provenance["malformed"]) == ("alpaca", 0)


def test_text_without_a_tokenizer(tmp_path):
    path = write(tmp_path / "sharegpt.json", CONVERSATIONS)
    with pytest.raises(UserError, match=r"trace\.tokenizer=.*trace=sharegpt, trace=alpaca or trace=wmt16_1shot"):
        load_trace(TraceConfig(path=path))


def test_a_tokenizer_that_is_none(tmp_path):
    path = write(tmp_path / "sharegpt.json", CONVERSATIONS)
    with pytest.raises(UserError, match=r"trace\.tokenizer=.*nowhere: cannot be loaded"):
        load_trace(TraceConfig(path=path, tokenizer=str(tmp_path / "nowhere")))


def test_azure_as_published(tmp_path):
    path = write(
        tmp_path / "AzureLLMInferenceTrace_conv.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    )
    trace = load_trace(TraceConfig(path=path))
    assert trace.provenance["format"] == "azure"
    assert trace.prompt_tokens.tolist() == [374, 396]
    np.testing.assert_allclose(trace.arrival_s, [0, 4.314579], atol=1e-9)


def test_azure_with_seconds(data_file):
    stated, trace = (
        pd.read_csv(data_file("azure_code.csv")),
        load_trace(TraceConfig(path=str(data_file("azure_code.csv")))),
    )
    assert trace.arrival_s.tolist() == stated.arrival_s.tolist()
    assert trace.prompt_tokens.tolist() == stated.prompt_tokens.tolist()
    assert trace.output_tokens.tolist() == stated.output_tokens.tolist()


def test_mooncake(data_file):
    path = data_file("mooncake_synthetic.jsonl")
    stated = [json.loads(line) for line in path.read_text().splitlines()]
    trace = load_trace(TraceConfig(path=str(path), keep_hash_ids=True))
    assert trace.prompt_tokens.tolist() == [each["input_length"] for each in stated]
    assert trace.output_tokens.tolist() == [each["output_length"] for each in stated]
    assert trace.arrival_s.tolist() == [each["timestamp"] / 1000 for each in stated]
    assert [ids.tolist() for ids in trace.hash_ids] == [each["hash_ids"] for each in stated]
    assert load_trace(TraceConfig(path=str(path))).hash_ids is None


def test_conversations_keep_their_turns_together(data_file):
    path = data_file("sharegpt_multiturn_lengths.csv")
    assert (
        load_trace(TraceConfig(path=str(path))).conversation_ids.tolist() == pd.read_csv(path).conversation_id.tolist()
    )


def test_extra_columns_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_bytes(b'\xef\xbb\xbf\r\n\r\nname,"output_tokens",prompt_tokens\r\nx,2,1\r\n\r\n"y, z",4,3\r\n')
    trace = load_trace(TraceConfig(path=str(path)))
    assert trace.prompt_tokens.tolist() == [1, 3]
    assert trace.output_tokens.tolist() == [2, 4]
    assert trace.arrival_s is None


def test_json_arrays_and_lines_are_one_format(tmp_path):
    records = [{"prompt_tokens": i, "output_tokens": 1, "arrival_s": i / 2} for i in range(1, 4)]
    lines = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    array = write(tmp_path / "b.json", json.dumps(records, indent=2))
    for path in (lines, array):
        trace = load_trace(TraceConfig(path=path, format="lengths"))
        assert trace.prompt_tokens.tolist() == [1, 2, 3]
        assert trace.arrival_s.tolist() == [0.5, 1.0, 1.5]


@pytest.fixture
def numbered(tmp_path):
    """A file of prompts 1 to 100."""
    return write(tmp_path / "n.csv", "prompt_tokens,output_tokens\n" + "".join(f"{i},1\n" for i in range(1, 101)))


def test_the_first_requests_in_order_repeated_if_too_short(numbered):
    assert load_trace(TraceConfig(path=numbered, num_requests=3)).prompt_tokens.tolist() == [1, 2, 3]
    again = load_trace(TraceConfig(path=numbered), num_requests=203)
    assert again.prompt_tokens.tolist() == [*range(1, 101), *range(1, 101), 1, 2, 3]
    assert again.provenance["rounds"] == 3


def test_shuffle_is_by_seed_and_before_the_cut(numbered):
    def first(seed):
        return load_trace(TraceConfig(path=numbered, shuffle=True, seed=seed, num_requests=10)).prompt_tokens.tolist()

    assert first(0) == first(0) != first(1)
    assert max(first(0)) > 10
    assert len(set(first(0))) == 10


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "n.csv", "prompt_tokens,output_tokens\n1,1\n")
    assert load_trace(TraceConfig(path=path)).prompt_tokens.tolist() == [1]
    write(tmp_path / "n.csv", "prompt_tokens,output_tokens\n22,1\n")
    assert load_trace(TraceConfig(path=path)).prompt_tokens.tolist() == [22]


def test_hub_names_go_through_load_dataset_and_the_same_checks(monkeypatch, tokenizer):
    asked = []

    def load_dataset(path, data_files, split):
        asked.append((path, data_files, split))
        return datasets.Dataset.from_list(
            [{"instruction": "a b", "input": "", "output": "c"}, {"instruction": "d", "input": "e", "output": None}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TraceConfig(path="tatsu-lab/alpaca", tokenizer=tokenizer, data_files="x.json", on_bad_record="skip")
    trace = load_trace(config)
    assert asked == [("tatsu-lab/alpaca", "x.json", "train")]
    assert trace.prompt_tokens.tolist() == [3]
    assert trace.provenance["malformed_reasons"] == ["record 2: output is None, not text"]
    assert trace.provenance["hub"] == "tatsu-lab/alpaca"


def test_a_hub_that_does_not_answer(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"someone/trace.*no route"):
        load_trace(TraceConfig(path="someone/trace"))
