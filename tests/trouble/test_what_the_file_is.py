"""A file is what its content says, whatever its name: it is read, or the message says what it is."""

import bz2
import gzip
import json
import lzma
import os
import re
import socket
import zipfile
from io import BytesIO

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.trace import TraceConfig, load_trace

CSV = "prompt_tokens,output_tokens\n3,5\n4,6\n"
RECORDS = [{"prompt_tokens": 3, "output_tokens": 5}, {"prompt_tokens": 4, "output_tokens": 6}]
ARRAY = json.dumps(RECORDS)
LINES = "\n".join(map(json.dumps, RECORDS))
TEXTS = {"CSV": CSV, "an array": ARRAY, "lines": LINES}


def parquet(table):
    buffer = BytesIO()
    pd.DataFrame(table).to_parquet(buffer)
    return buffer.getvalue()


PARQUET = parquet(RECORDS)


def zipped(text):
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("trace.csv", text)
    return buffer.getvalue()


def refused(path):
    """What is said of a file that is not read, whatever is done with bad records."""
    said = set()
    for policy in ("error", "skip"):
        with pytest.raises(UserError) as error:
            load_trace(TraceConfig(path=str(path), on_bad_record=policy))
        said.add(str(error.value))
    (message,) = said
    assert str(path) in message
    return message


@pytest.fixture
def said(tmp_path):
    """`said(content)` is what is said of a file of that content."""

    def write(content):
        path = tmp_path / "trace.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return refused(path)

    return write


@pytest.mark.parametrize("name", ["trace", "trace.csv", "trace.json", "trace.jsonl.gz", "trace.parquet"])
@pytest.mark.parametrize(
    "content", [*TEXTS.values(), *(gzip.compress(text.encode()) for text in TEXTS.values()), PARQUET]
)
def test_the_name_says_nothing(loaded, name, content):
    file = loaded(content, name)
    assert (file.prompts, file.bad) == ([3, 4], [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_encodings(loaded, text, encoding):
    for content in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        assert loaded(content).prompts == [3, 4]


OTHER_SHAPES = {
    "blank lines first": f"\n \r\n\n{LINES}",
    "printed over several lines": json.dumps(RECORDS, indent=2),
    "one after the other, over several lines": "\n".join(json.dumps(each, indent=2) for each in RECORDS),
    "one of the lines is several": f"{json.dumps(RECORDS[0])}\n{json.dumps(RECORDS[1], indent=2)}\n",
    "wrapped": json.dumps({"version": 2, "data": RECORDS, "tags": ["a"]}),
    "wrapped, over several lines": json.dumps({"requests": RECORDS}, indent=4),
    "CRLF": LINES.replace("\n", "\r\n") + "\r\n",
    "CR": LINES.replace("\n", "\r"),
    "blank lines between": LINES.replace("\n", "\n\n \n"),
}


@pytest.mark.parametrize("content", OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_shapes_of_json(loaded, content):
    file = loaded(content)
    assert (file.prompts, file.bad, file.read) == ([3, 4], [], 2)


def test_a_record_alone(loaded):
    assert loaded(json.dumps(RECORDS[0], indent=1)).prompts == [3]
    assert loaded(json.dumps([RECORDS[0]])).prompts == [3]


def test_parquet_has_what_json_has(loaded, tokenizer):
    stamps = pd.to_datetime(["2023-11-16 18:17:03.5", "2023-11-16 18:17:05"], format="ISO8601")
    azure = {"TIMESTAMP": stamps, "ContextTokens": [3, 4], "GeneratedTokens": [5, 6]}
    assert loaded(parquet(azure)).trace.arrival_s.tolist() == [0, 1.5]
    chat = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]
    assert loaded(parquet({"conversations": [chat, chat]}), tokenizer=tokenizer).prompts == [3, 3]
    moon = {"timestamp": [0, 500], "input_length": [600, 600], "output_length": [1, 1], "hash_ids": [[1, 2], [1, 3]]}
    file = loaded(parquet(moon), keep_hash_ids=True)
    assert [ids.tolist() for ids in file.trace.hash_ids] == [[1, 2], [1, 3]]


def test_gzip_of_several_parts(loaded):
    head, tail = CSV[:35].encode(), CSV[35:].encode()
    assert loaded(gzip.compress(head) + gzip.compress(tail)).prompts == [3, 4]


LONG = gzip.compress(("prompt_tokens,output_tokens\n" + "".join(f"{n},{n % 7 + 1}\n" for n in range(1, 3000))).encode())
WHAT = {
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-lfs"),
    "HTML": ("<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "page"),
    "HTML in capitals, behind a mark": ("\ufeff\n  <HTML><BODY>Log in</BODY></HTML>", "page"),
    "XML": ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "page"),
    "zip": (zipped(CSV), "zip"),
    "xz": (lzma.compress(CSV.encode()), "xz"),
    "bzip2": (bz2.compress(CSV.encode()), "bzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(40), "zstd"),
    "gzip of gzip": (gzip.compress(gzip.compress(CSV.encode())), "gzip inside gzip"),
    "gzip of parquet": (gzip.compress(PARQUET), "parquet inside gzip"),
    "gzip of a page": (gzip.compress(b"<html></html>"), "page"),
    "gzip cut short": (LONG[:-20], "gzip, and broken or cut short"),
    "gzip cut shorter": (LONG[:4], "gzip, and broken or cut short"),
    "gzip broken within": (LONG[:200] + b"\xff" * 40 + LONG[240:], "gzip, and broken or cut short"),
    "gzip of other content": (LONG[:-8] + bytes(4) + LONG[-4:], "gzip, and broken or cut short"),
    "parquet cut short": (PARQUET[:-10], "begins like parquet"),
    "parquet of four bytes": (b"PAR1", "begins like parquet"),
    "parquet whose names are no text": (PARQUET.replace(b"output_tokens", b"\xfeutput_tokens"), "begins like parquet"),
    "parquet broken within": (b"PAR1" + bytes(100) + PARQUET[104:], "begins like parquet"),
    "UTF-16 cut short": (CSV.encode("utf-16")[:-1], "utf-16"),
    "NUL bytes": (bytes(4096), "NUL bytes"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "its first line is no text"),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(50), "its first line is no text"),
    "latin-1 in the header": ("größe,prompt_tokens,output_tokens\n1,2,3\n".encode("latin-1"), "byte 0xf6 is not UTF-8"),
    "a pickle": (b"\x80\x04\x95", "pickle"),
    "nothing": ("", "is empty"),
    "spaces": (" \n\t\n\r\n", "is empty"),
    "a mark alone": ("\ufeff", "is empty"),
    "gzip of nothing": (gzip.compress(b""), "is empty"),
    "an empty array": ("[ ]", "holds no record"),
    "an error": ('{"error": {"message": "not found"}}', r"its fields \(error\) fit no format"),
    "two lists of records": (json.dumps({"a": RECORDS, "b": RECORDS}), r"its fields \(a, b\) fit no format"),
    "no header": ("3,5\n4,6\n", r"its fields \(3, 5\) fit no format"),
    "prose": ("Dear reader\n", r"its fields \(Dear reader\) fit no format"),
}


@pytest.mark.parametrize(("content", "what"), WHAT.values(), ids=WHAT)
def test_what_it_is_instead(said, content, what):
    assert re.search(what, said(content))


@pytest.mark.parametrize(
    "content", ["[", '[{"prompt_tokens": 3,', "[{'prompt_tokens': 3, 'output_tokens': 5}]", "{", "{}{}"]
)
def test_json_of_no_whole_record_says_where_it_breaks(content, tmp_path):
    path = tmp_path / "trace"
    path.write_text(content)
    for policy, message in (("error", "record 1: "), ("skip", "holds no record; record 1: ")):
        with pytest.raises(UserError, match=f"{path}.*{message}"):
            load_trace(TraceConfig(path=str(path), on_bad_record=policy))


def test_a_first_line_is_quoted_so_that_it_can_be_printed(said):
    assert len(said("x" * 100_000 + "," + "y," * 10_000)) < 5000
    for line in ("\x1b[2J,a\n", "\n\ufeffprompt_tokens,output_tokens\n", '{"\\ud83d": 1, "\\u0007": 2}'):
        assert said(line).isprintable()


def test_a_pipe_a_socket_a_device_and_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refused(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "is a socket" in refused(tmp_path / "socket")
    assert "is a device" in refused("/dev/null")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert "is a folder" in refused(tmp_path / "link")


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"a link to {tmp_path / 'gone'}" in refused(tmp_path / "link")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert "cannot be read" in refused(tmp_path / "ring")


@pytest.mark.parametrize(
    "name", ["~nobody-of-that-name/trace.csv", "x" * 300 + ".csv", "a\0b.csv", "/dev/null/trace.csv"]
)
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"trace\.path="):
        load_trace(TraceConfig(path=name))


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300, "a/" + "x" * 100, "-a/b", "a/b.csv", "a/b/c"])
def test_names_that_no_data_set_can_have_ask_nobody(name, ran, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *name, **keys: pytest.fail("it was asked for"))
    with pytest.raises(UserError, match=r"trace\.path="):
        ran("memory_waste", f"trace.path={name}")


def test_a_name_that_the_hub_cannot_have_is_told(ran):
    with pytest.raises(UserError, match=r"a/b\.\.c"):
        ran("memory_waste", "trace.path=a/b..c")


def test_a_file_of_somebody_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "permission" in refused(path)


def test_the_prefix_of_few_shot_prompts_is_read_like_any_file(tmp_path, tokenizer):
    sentences = tmp_path / "wmt16.jsonl"
    sentences.write_text('{"translation": {"en": "a b", "de": "c"}}')
    prefix = tmp_path / "prefix"
    config = {"path": str(sentences), "tokenizer": tokenizer, "examples": 1, "prefix_path": str(prefix)}
    prefix.write_bytes(gzip.compress(json.dumps({"prefixes": {"1": {"text": "say: "}}}).encode("utf-16")))
    assert load_trace(TraceConfig(**config)).prompt_tokens.tolist() == [5]  # BOS, say:, a, b, =>
    prefix.write_text('{"prefixes": {"1": {"text": "\\ud83d"}}}')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        load_trace(TraceConfig(**config))
    prefix.unlink()
    prefix.mkdir()
    with pytest.raises(UserError, match=r"trace\.prefix_path=.* is a folder"):
        load_trace(TraceConfig(**config))


def test_a_file_that_fails_while_it_is_read(ran):
    """As on a bad disk: the kernel maps nothing at the beginning of a process."""
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read"):
        ran("memory_waste", "systems=[paged]", "trace.path=/proc/self/mem")
