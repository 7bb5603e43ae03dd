"""Text into lengths: what a tokenizer makes of prompts and outputs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvarena.errors import UserError
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns

_BATCH = 1000  # texts that a tokenizer is given at once


class Texts(NamedTuple):
    """What one record states."""

    number: int  # in its source, from 1
    prompt: str
    output: str | float  # or its number of tokens


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers, from a folder or the hub. Raises UserError where there is none."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"trace.tokenizer={name} needs the package transformers: pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the hub, the disk or the tokenizer's own code raise
        raise UserError(f"trace.tokenizer={name}: cannot be loaded: {error}") from error


def count_tokens(texts: Sequence[Texts], tokenizer: Any, bad: BadRecords) -> Columns:
    """Columns of token counts; a record whose text the tokenizer refuses goes to `bad`.

    The tokenizer adds its special tokens to both sides, as PagedAttention's artifact has it: with OPT's or LLaMA's
    tokenizer every count includes one BOS, so that an empty text counts 1.
    """
    columns = Columns([], [], [])
    for start in range(0, len(texts), _BATCH):
        for number, prompt, output in _counted(texts[start : start + _BATCH], tokenizer, bad):
            columns.numbers.append(number)
            columns.prompt.append(prompt)
            columns.output.append(output)
    return columns


def _counted(batch: Sequence[Texts], tokenizer: Any, bad: BadRecords) -> Iterator[tuple[int, int, float]]:
    """(number, tokens of the prompt, of the output): all at once, or one by one to see which is refused."""
    try:
        prompts, outputs = (
            tokenizer(side, verbose=False)["input_ids"]
            for side in ([each.prompt for each in batch], [str(each.output) for each in batch])
        )
    except Exception as error:  # whatever a tokenizer raises
        if len(batch) == 1:
            bad.add(batch[0].number, f"the tokenizer refuses its text: {type(error).__name__}: {error}")
            return
        for each in batch:
            yield from _counted([each], tokenizer, bad)
    else:
        for each, prompt, output in zip(batch, prompts, outputs, strict=True):
            yield each.number, len(prompt), len(output) if isinstance(each.output, str) else each.output


def no_tokenizer(source: str, format_name: str) -> UserError:
    """The refusal of text that nothing can count."""
    return UserError(
        f"{source} holds {format_name} text, and lengths need a tokenizer: set trace.tokenizer=<folder or hub name> "
        "(facebook/opt-13b for PagedAttention's counts, a LLaMA for those of wmt16), or take a trace of lengths: leave "
        "trace.path out and the embedded length table of trace=sharegpt, trace=alpaca or trace=wmt16_1shot is used"
    )
