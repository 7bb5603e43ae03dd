"""Fig 16 from text: both panels read the same sentences, each behind its own examples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.errors import UserError


@pytest.fixture
def of_text(tmp_path: Path, tokenizer: str) -> tuple[str, ...]:
    """Overrides that read sentences of 4 words behind prefixes of 40 and 100 tokens, BOS among them."""
    path = tmp_path / "wmt.jsonl"
    path.write_text((json.dumps({"translation": {"en": "one two three four", "de": "eins zwei"}}) + "\n") * 9)
    texts = {shots: {"text": "w " * words} for shots, words in (("1", 39), ("5", 99))}
    (tmp_path / "wmt16_prefix.json").write_text(json.dumps({"prefixes": texts}))
    return f"trace.path={path}", f"trace.tokenizer={tokenizer}", "arrival.duration_s=5", "params.rates=[4]"


def panel(trace: str, prefix_tokens: int) -> str:
    return f"{{trace: {trace}, prefix_tokens: {prefix_tokens}, guess: {{others: 1}}}}"


def test_both_panels_read_the_file(finished: Callable[..., Path], of_text: tuple[str, ...]) -> None:
    panels = f"params.panels={{fig16a: {panel('wmt16_1shot', 32)}, fig16b: {panel('wmt16_5shot', 96)}}}"
    folder = finished("shared_prefix", "systems=[orca-oracle,paged]", panels, *of_text)
    notes = json.loads((folder / "provenance.json").read_text())
    assert {name: notes[name]["mean_prompt_tokens"] for name in ("fig16a", "fig16b")} == {"fig16a": 45, "fig16b": 105}
    assert [notes[name]["trace"]["prefix_tokens"] for name in ("fig16a", "fig16b")] == [40, 100]


def test_no_more_is_shared_than_the_prefix_holds(finished: Callable[..., Path], of_text: tuple[str, ...]) -> None:
    panels = f"params.panels={{fig16a: {panel('wmt16_1shot', 41)}}}"
    with pytest.raises(UserError, match=r"fig16a\.prefix_tokens=41.*wmt16_prefix\.json.* 40 "):
        finished("shared_prefix", "systems=[paged]", panels, "params.only=[fig16a]", *of_text)
