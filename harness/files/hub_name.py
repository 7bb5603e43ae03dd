"""Whether a name can be that of a data set or a model on the Hugging Face hub."""

import re

_OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LONGEST = 96  # letters, the hub says
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".txt", ".pkl", ".parquet", ".gz")


def is_hub_name(name: str) -> bool:
    """Whether it is `owner/name`, and not the name of a file that is missing."""
    return bool(_OWNER_AND_NAME.fullmatch(name)) and len(name) <= _LONGEST and not name.endswith(_FILE_ENDINGS)
