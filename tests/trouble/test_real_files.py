"""Public files, where they are at hand: every record is read, with what stands in it."""

import csv
import json

import pytest

from kvarena.harness.trace import TraceConfig, load_trace

FILES = {  # as published, and as in the folder of data beside the checkout: records
    ("AzureLLMInferenceTrace_conv.csv", "azure_conv.csv"): 19366,
    ("AzureLLMInferenceTrace_code.csv", "azure_code.csv"): 8819,
    ("conversation_trace.jsonl", "mooncake_conversation.jsonl"): 12031,
    ("synthetic_trace.jsonl", "mooncake_synthetic.jsonl"): 3993,
    ("dummy_conversation.json", "fastchat_dummy.json"): 500,
}
PROMPTS = ("ContextTokens", "prompt_tokens", "input_length")
OUTPUTS = ("GeneratedTokens", "output_tokens", "output_length")


@pytest.fixture(params=FILES, ids=lambda names: names[1])
def public(request, shared):
    """Path of a file under either name, and its number of records; skips where neither is there."""
    published, own = request.param
    try:
        path = shared(f"data/{published}")
    except pytest.skip.Exception:
        path = shared(f"data/{own}")
    return path, FILES[request.param]


def test_every_record_of_a_public_file_is_read(public, tokenizer):
    path, records = public
    trace = load_trace(TraceConfig(path=str(path), filter="none", tokenizer=tokenizer))
    facts = trace.provenance
    assert (facts["read"], facts["malformed"], facts["kept"]) == (records, 0, len(trace))
    assert len(trace) + facts["without_request"] == records
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json":
            assert len(json.load(file)) == records
            return
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else list(map(json.loads, file))
    for fields, read in ((PROMPTS, trace.prompt_tokens), (OUTPUTS, trace.output_tokens)):
        (field,) = set(fields) & set(rows[0])
        assert [int(row[field]) for row in rows] == read.tolist()
    assert trace.arrival_s is not None
    assert trace.arrival_s.min() == 0
