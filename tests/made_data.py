"""Files of our own making in the formats of public traces, so that a test needs no data beside the project.

What they hold is drawn here: a test compares what is read of a file with what stands in it, not with a paper.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from kvarena.harness.trace import TraceConfig, load_trace

BLOCK = 512  # tokens of a block that has an id, as in Mooncake's files


def lengths(table: str, count: int) -> pd.DataFrame:
    """Lengths like those of a data set; every twentieth output is ten times as long, beyond most contexts."""
    drawn = load_trace(TraceConfig(table=table, num_requests=count))
    outputs = np.where(np.arange(count) % 20 == 7, 10 * drawn.output_tokens, drawn.output_tokens)
    return pd.DataFrame({"prompt_tokens": drawn.prompt_tokens, "output_tokens": outputs})


def chats(count: int) -> pd.DataFrame:
    """Turns of conversations, each prompt with all that was said before it."""
    drawn = load_trace(TraceConfig(table="sharegpt_multiturn", num_requests=count))
    turns = pd.Series(drawn.conversation_ids).groupby(drawn.conversation_ids).cumcount()
    return pd.DataFrame(
        {"conversation_id": drawn.conversation_ids, "turn": turns, "prompt_tokens": drawn.prompt_tokens,
         "output_tokens": drawn.output_tokens}
    )  # fmt: skip


def azure(count: int) -> pd.DataFrame:
    """Lengths with seconds of arrival, some at the same time."""
    gaps = np.random.default_rng(0).exponential(0.4, count).round(6)
    gaps[::9] = 0
    return lengths("azure_code", count).assign(arrival_s=gaps.cumsum().round(6))


def mooncake(count: int) -> list[dict[str, object]]:
    """Prompts of blocks with ids; two of three go on from the beginning of an earlier one."""
    random = np.random.default_rng(0)
    known, requests, fresh = [], [], 0
    for number in range(count):
        base = known[random.integers(len(known))] if number % 3 else []
        shared = base[: random.integers(len(base) + 1)]
        own = int(random.integers(1, 12))
        ids = [*shared, *range(fresh, fresh + own)]
        fresh += own
        known.append(ids)
        tokens = len(ids) * BLOCK - int(random.integers(BLOCK))
        requests.append(
            {"timestamp": 250 * number, "input_length": tokens, "output_length": 1 + number % 50, "hash_ids": ids}
        )
    return requests


def write(folder: Path, name: str) -> Path:
    """Make the file of that name, in its format. Raises KeyError for one that is not made here."""
    frames = {
        "alpaca_lengths.csv": lambda: lengths("alpaca", 9000),
        "sharegpt_lengths.csv": lambda: lengths("sharegpt", 9000),
        "sharegpt_multiturn_lengths.csv": lambda: chats(6000),
        "azure_code.csv": lambda: azure(2000),
    }
    path = folder / name
    if name == "mooncake_synthetic.jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in mooncake(700)))
    else:
        frames[name]().to_csv(path, index=False)
    return path


def write_tokenizer(folder: Path) -> str:
    """A tokenizer: a word is a token, and every text begins with one BOS, as with OPT's and LLaMA's. Its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)
