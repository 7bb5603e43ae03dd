"""Every record of every file is kept with what stands in it, dropped by a named rule, or bad with its number.

Files of each format are made, whole or with one thing wrong (trace_mutations.py), read piece by piece by hand
(traces_by_hand.py), and given to the loader. `HYPOTHESIS_RANDOM=1 KVARENA_FILES=2000` tries as many new ones;
benchmarks/mutated_files.py tries 10,000.
"""

import os
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_makers import KINDS
from trace_mutations import trace_file
from traces_by_hand import expected
from traces_loaded import Loader, unaccounted


@pytest.fixture(scope="module")
def loader(tmp_path_factory, tokenizer):
    loader = Loader(tmp_path_factory.mktemp("files"), tokenizer)
    yield loader
    loader.patches.undo()


@settings(max_examples=int(os.environ.get("KVARENA_FILES", "200")))
@given(data=st.data())
def test_every_record_is_accounted_for(loader, data):
    file = trace_file(lambda options: data.draw(st.sampled_from(options)))
    assert not loader.complaints(file), repr(file)


@pytest.mark.parametrize("container", ["csv", "json", "jsonl"])
def test_a_file_that_is_cut_off_anywhere(loader, container):
    kind = next(kind for kind in KINDS if kind.name == "lengths")
    files = (trace_file(random.Random(seed).choice, "none", kind) for seed in range(100))
    file = next(file for file in files if file.container == container and len(file.content) in range(150, 350))
    for end in range(len(file.content) + 1):
        cut = replace(file, content=file.content[:end])
        assert not loader.complaints(cut), repr(cut)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.required[0]}")
def test_a_file_without_a_fault_is_read_whole(loader, kind):
    for seed in range(6):
        file = trace_file(random.Random(seed).choice, "none", kind)
        right = expected(replace(file, format=kind.name))
        assert {each.fate for each in right.verdicts} <= {"kept", "dropped"}
        assert not loader.complaints(file), repr(file)


def swallow(loaded):
    """The last record that was kept, as if it were not there."""
    return loaded._replace(read=loaded.read - 1, columns={name: each[:-1] for name, each in loaded.columns.items()})


def changed(name, change):
    return lambda loaded: loaded._replace(columns=loaded.columns | {name: change(loaded.columns[name])})


FAULTS = {
    "a record is swallowed": swallow,
    "one is lost, and counted as read": lambda loaded: swallow(loaded)._replace(read=loaded.read),
    "one is kept, and counted as malformed": lambda loaded: loaded._replace(malformed=1, read=loaded.read + 1),
    "numbers begin at 0": changed("record", lambda numbers: [number - 1 for number in numbers]),
    "rows are shifted": changed("output_tokens", lambda values: values[1:] + values[:1]),
    "columns are swapped": lambda loaded: changed("prompt_tokens", lambda _: loaded.columns["output_tokens"])(loaded),
    "another unit": changed("arrival_s", lambda values: [1000 * value for value in values]),
    "ids of the neighbour": changed("hash_ids", lambda ids: ids[1:] + ids[:1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loader_with_a_fault_would_be_found_out(loader, fault):
    kind = next(kind for kind in KINDS if kind.name == "mooncake")
    files = (trace_file(random.Random(seed).choice, "none", kind) for seed in range(100))
    file = next(file for file in files if file.keep_hash_ids and len(expected(file).verdicts) > 2)
    loaded = loader.load(file, "skip")
    assert not unaccounted(expected(file), loaded)
    assert unaccounted(expected(file), FAULTS[fault](loaded))
