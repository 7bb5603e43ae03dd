"""docs/traces.md shows every format, and what it shows is loaded as it says."""

import json
import re

import pytest

from kvarena.harness.paths import ROOT
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.formats import FORMATS

PAGE = (ROOT / "docs" / "traces.md").read_text().partition("## Formats\n")[2].partition("\n## ")[0]
EXAMPLES = dict(re.findall(r"^`(\w+)`: (?:.+\n)+\n((?:    .+\n){3})\n", PAGE, re.MULTILINE))
LENGTHS = {  # prompts and outputs in tokens, and arrivals in seconds
    "lengths": ([161, 540], [338, 51], [0, 2.5]),
    "azure": ([4808, 3180], [10, 8], [0, 0.052]),
    "mooncake": ([655, 1030, 300], [52, 26, 7], [0, 3.052, 6]),
    "bailian": ([40, 64, 9], [8, 8, 80], [61.114, 63.2, 64.5]),
    "guidellm": ([128, 256, 64], [64, 32, 16], [0, 0.75, 2.25]),
    "burstgpt": ([472, 1087], [18, 230], [0, 40]),
    "vidur": ([1240, 87], [103, 412], [0.3, 0.9]),
    "splitwise": ([374, 396], [44, 109], [0, 0.6]),
    "sharegpt": ([6, 4, 2], [3, 3, 2], None),  # words, and one BOS
    "alpaca": ([4, 6, 9], [5, 2, 2], None),
    "wmt16": ([6, 7, 7], [4, 5, 6], None),
}


@pytest.mark.parametrize("named", [False, True], ids=["by its fields", "by its name"])
@pytest.mark.parametrize("name", [*LENGTHS])
def test_an_example_is_read_as_the_page_says(tmp_path, tokenizer, name, named):
    (tmp_path / "example").write_text(re.sub("^    ", "", EXAMPLES[name], flags=re.MULTILINE))
    (tmp_path / "prefix").write_text(json.dumps({"prefixes": {"1": {"text": "Translate "}}}))
    trace = load_trace(
        TraceConfig(
            path=str(tmp_path / "example"),
            format=name if named else None,
            tokenizer=tokenizer,
            keep_hash_ids=None,
            examples=1,
            prefix_path=str(tmp_path / "prefix"),
        )
    )
    prompts, outputs, arrivals = LENGTHS[name]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (prompts, outputs)
    assert trace.provenance["read"] == trace.provenance["kept"] == len(prompts)
    assert (trace.hash_ids is not None) == (name in ("mooncake", "bailian"))
    assert trace.arrival_s is None if arrivals is None else trace.arrival_s.tolist() == pytest.approx(arrivals)


def test_every_format_has_one():
    assert set(EXAMPLES) == set(LENGTHS) == {form.name for form in FORMATS}
