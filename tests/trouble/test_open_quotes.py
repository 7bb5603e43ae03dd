"""A quote that nothing closes costs the line it stands on, and none below: a line of CSV is a record."""

import pytest

from kvarena.errors import UserError
from kvarena.harness.trace import TraceConfig, load_trace

HEADER = "prompt_tokens,output_tokens,note\n"


def test_all_other_rows_are_read(loaded):
    rows = [f"{n},5,ok" for n in range(1, 101)]
    rows[1] = '2,5,"6 in. screen'
    file = loaded(HEADER + "\n".join(rows) + "\n")
    assert (file.read, file.bad) == (100, [2])
    assert file.prompts == [1, *range(3, 101)]


QUOTES = {
    "at the end": ('1,5,a\n2,5,"b', [1], [2]),
    "in the first row": ('"1,5,a\n2,5,b\n', [2], [1]),
    "in the middle of a value": ('1,5,6" screen\n2,5,b\n', [2], [1]),
    "closed two lines on: a value with ends of line in it": ('1,5,"a\nb\nc"\n2,5,d\n', [2], [1, 2, 3]),
    "one in each of two rows": ('1,5,"a\n2,5,b\n3,5,c"\n4,5,d\n', [2, 4], [1, 3]),
    "in a row of the right number of quotes": ('1,5,a"b,"\n2,5,c\n', [2], [1]),
    "opened in the last of an even number": ('1,a"5,"b\n2,5,c\n', [2], [1]),
    "text behind the quote": ('1,5,"a"b\n2,5,c\n', [2], [1]),
    "well quoted": ('"1","5","a, b"\n2,5,"6"" screen"\n', [1, 2], []),
    "well quoted, empty": ('1,5,""\n2,5,""""\n', [1, 2], []),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(("rows", "kept", "bad"), QUOTES.values(), ids=QUOTES)
def test_a_line_is_a_record(loaded, rows, kept, bad, end):
    file = loaded((HEADER + rows).replace("\n", end))
    assert (file.prompts, file.bad) == (kept, bad)
    assert file.read == len(rows.splitlines())


def test_the_first_open_quote_stops_the_load_where_that_is_asked_for(loaded):
    with pytest.raises(UserError, match="record 2: an odd number of quotes"):
        loaded(HEADER + '1,5,a\n2,5,"b\n3,5,c\n', on_bad_record="error")


LINES = {
    "a repeated header": ("1,5,a\nprompt_tokens,output_tokens,note\n3,5,b", [1, 3], [2]),
    "too short": ("1,5,a\n2,5\n3,5,b", [1, 3], [2]),
    "too long": ("1,5,a\n2,5,a,\n3,5,b", [1, 3], [2]),
    "commas alone": ("1,5,a\n,,\n3,5,b", [1, 3], [2]),
    "another separator": ("1,5,a\n2;5;a\n3,5,b", [1, 3], [2]),
    "NUL in a number": ("1,5,a\n2\0,5,a\n3,5,b", [1, 3], [2]),
    "NUL elsewhere": ("1,5,a\n2,5,\0\n3,5,b", [1, 2, 3], []),
    "ends of line that only Unicode knows": ("1,5,a\u2028b\n2,5,a\x0bb\x0c\n3,5,\x85", [1, 2, 3], []),
    "blank lines": ("\n1,5,a\n\n  \n3,5,b\n\n", [1, 3], []),
    "a value of 300 kB": (f'1,5,{"x" * 300_000}\n3,5,"{"y, " * 100_000}"', [1, 3], []),
}


@pytest.mark.parametrize(("rows", "kept", "bad"), LINES.values(), ids=LINES)
def test_what_else_a_line_can_be(loaded, rows, kept, bad):
    file = loaded(HEADER + rows)
    assert (file.prompts, file.bad) == (kept, bad)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_seen_from_the_header(loaded, separator):
    rows = ["note,prompt_tokens,output_tokens", ",1,5", '"a, b; c\t|",2,5', "3,5"]
    text = "\n".join(
        [
            rows[0].replace(",", separator),
            rows[1].replace(",", separator),
            f'"a, b; c\t|"{separator}2{separator}5',
            rows[3],
        ]
    )
    file = loaded(text)
    assert (file.prompts, file.bad) == ([1, 2], [3])


HEADERS = {
    "quoted": '"prompt_tokens", "output_tokens"'.replace(" ", ""),
    "spaced": " prompt_tokens , output_tokens ",
    "behind blank lines": "\n \r\n\nprompt_tokens,output_tokens",
    "behind a byte order mark": "\ufeffprompt_tokens,output_tokens",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers(loaded, header):
    assert loaded(f"{header}\n3,5").prompts == [3]


def test_a_column_without_a_name_is_no_column_of_ours(loaded):
    assert loaded("\tprompt_tokens\toutput_tokens\n0\t3\t5\n").prompts == [3]  # as pandas writes its index
    assert loaded("prompt_tokens,output_tokens,,\n3,5,,\n").prompts == [3]
    with pytest.raises(UserError, match="column prompt_tokens stands twice"):
        loaded("prompt_tokens,output_tokens,prompt_tokens\n3,5,4\n")


NUMBERS = {
    " 12 ": 12,
    "+5": 5,
    "12.0": 12,
    "1e3": 1000,
    "1E+3": 1000,
    "5.": 5,
    "0012": 12,
    '"7"': 7,
}
NOT_NUMBERS = [
    "1_000",
    "0x10",
    "\uff11\uff12",
    "\u0663",
    "inf",
    "-inf",
    "nan",
    "1e400",
    "1 000",
    '"1,000"',
    "1d3",
    "True",
    "-0",
    "0",
    "-5",
    "1.5",
    "1e-1",
    "",
    " ",
    "--5",
    "1e",
    ".",
    "2147483648",
    "9" * 5000,
]


def test_a_number_is_what_everybody_reads_as_that_number(loaded):
    file = loaded("prompt_tokens,output_tokens\n" + "".join(f"{text},1\n" for text in NUMBERS))
    assert (file.prompts, file.bad) == (list(NUMBERS.values()), [])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_number(loaded, text):
    file = loaded(f"prompt_tokens,output_tokens\n1,1\n{text},1\n1,{text}\n2,2\n")
    assert (file.prompts, file.bad) == ([1, 2], [2, 3])


@pytest.mark.parametrize("content", ["prompt_tokens,output_tokens", "prompt_tokens,output_tokens\n\n \n"])
def test_a_header_alone(tmp_path, content):
    path = tmp_path / "header.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: holds no record"):
        load_trace(TraceConfig(path=str(path)))
