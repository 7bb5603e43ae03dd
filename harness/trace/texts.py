"""Text into lengths: what a tokenizer makes of prompts and outputs."""

from typing import Any

from datasets import Dataset

from kvarena.errors import UserError


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


def count_tokens(texts: Dataset, tokenizer: Any) -> Dataset:
    """Columns prompt and output, text, become token counts: prompt_tokens and output_tokens.

    The tokenizer adds its special tokens to both sides, as PagedAttention's artifact has it: with OPT's or LLaMA's
    tokenizer every count includes one BOS, so that an empty text counts 1.
    """

    def count(batch: dict[str, list[str]]) -> dict[str, list[int]]:
        return {
            f"{side}_tokens": [len(ids) for ids in tokenizer(batch[side], verbose=False)["input_ids"]]
            for side in ("prompt", "output")
        }

    return texts.map(count, batched=True, remove_columns=["prompt", "output"])


def no_tokenizer(source: str, format_name: str) -> UserError:
    """The refusal of text that nothing can count."""
    return UserError(
        f"{source} holds {format_name} text, and lengths need a tokenizer: set trace.tokenizer=<folder or hub name> "
        "(facebook/opt-13b for PagedAttention's counts, a LLaMA for those of wmt16), or take a trace of lengths: leave "
        "trace.path out and the embedded length table of trace=sharegpt, trace=alpaca or trace=wmt16_1shot is used"
    )
