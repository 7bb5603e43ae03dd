"""What a user may say of a trace; the files of conf/trace/ are instances."""

from dataclasses import dataclass


@dataclass
class TraceConfig:
    """A trace comes from a file (`path`), else from an embedded length table, else from given lengths."""

    name: str = "trace"
    path: str | None = None  # local file, or the name of a data set on the Hugging Face hub (owner/name)
    format: str | None = None  # a name of formats.py; null: seen from the fields
    time_unit: str | None = None  # of a file's stamps: s, ms, us, ns; null: as units.py finds it
    block_tokens: int | None = None  # tokens that an id of a file's hash_ids stands for; null: as units.py finds it
    data_files: str | None = None  # hub only: the file of the data set to load
    split: str = "train"  # hub only
    tokenizer: str | None = None  # folder or hub name; needed where the file holds text
    filter: str | None = None  # a recipe of recipes.py; null: `paper_filter` where it belongs, else fits_context
    paper_filter: str = "none"  # of the trace's table, and of files listed for it (published_files.py)
    on_bad_record: str = "error"  # error: the first malformed record stops the load; skip: count and report
    table: str | None = None  # an embedded length table
    prompt_tokens: int | None = None  # given lengths: the prompt's
    output_tokens: int | None = None  # given lengths: the output's
    range_ratio: float = 0.0  # given lengths: uniform within length * (1 -+ range_ratio)
    num_requests: int | None = None  # null: as many as arrive, else the whole file, 1000 without one
    repeat: bool = True  # files only: one that has fewer than num_requests is gone through again
    max_tokens: int | None = None  # longest prompt + output allowed; null: the model's context
    seed: int = 0
    mix: dict[str, float] | None = None  # shares of requests by method of decoding (decoding/mix.py); null: all alike
    shuffle: bool = False  # files only: put the records into a random order before the first are taken
    keep_hash_ids: bool | None = False  # keep the ids of each prompt's blocks; null: where a file has them
    cut_prompt: int | None = None  # longer prompts keep their last so many tokens, as a chat's history is cut
    cut_output: int | None = None  # longer outputs end there
    new_conversation: float | None = (
        None  # chats only: probability that an arrival begins one (requests/chatbot_order.py)
    )
    examples: int | None = None  # wmt16 only: solved examples that every prompt begins with (few_shot.py)
    prefix_path: str | None = None  # wmt16 only: the file of their text; null: wmt16_prefix.json beside `path`
