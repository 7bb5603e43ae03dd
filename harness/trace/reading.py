"""A trace's records, from a local file or the hub: checked one by one, then a `datasets.Dataset` of the clean ones."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from kvarena.errors import UserError
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns, check_columns
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.csv_file import read_csv
from kvarena.harness.trace.few_shot import few_shot
from kvarena.harness.trace.formats import TextFormat
from kvarena.harness.trace.json_file import json_records
from kvarena.harness.trace.published_files import sha256
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.records import Records, detect, length_columns, well_formed
from kvarena.harness.trace.texts import count_tokens, load_tokenizer, no_tokenizer

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".txt", ".pkl", ".parquet", ".gz")


class Reading(NamedTuple):
    """What a source holds."""

    # record (its number), prompt_tokens, output_tokens; arrival_s, conversation_id, hash_ids where the source has them
    dataset: datasets.Dataset
    facts: dict[str, Any]  # for the trace's provenance


def read(config: TraceConfig, recipe: Recipe) -> Reading:
    """Read `config.path`. Raises UserError: no such file, no known format, text without a tokenizer, a bad record."""
    source = str(config.path)
    path = Path(source).expanduser()
    bad = BadRecords(source, config.on_bad_record)
    if path.is_file():
        origin: dict[str, Any] = {"path": str(path), "sha256": sha256(path)}
        columns, facts = _read_file(path, config, recipe, bad)
    elif path.exists():
        raise UserError(f"trace.path={source}: is a folder, not a file")
    elif not _HUB_NAME.fullmatch(source) or source.endswith(_FILE_ENDINGS):
        raise UserError(f"trace.path={source}: no such file (nor is it a hub's owner/name)")
    else:
        origin = {"hub": source, "data_files": config.data_files, "split": config.split}
        columns, facts = _read_records(enumerate(_from_hub(config), start=1), config, recipe, bad)
    clean = check_columns(columns, bad)
    bad.report()
    if config.keep_hash_ids and "hash_ids" not in clean:
        raise UserError(f"trace.keep_hash_ids: {source} has none; Mooncake's JSONL does")
    seen = len(clean["record"]) + bad.count + facts["without_request"]
    counts = {"read": seen, "malformed": bad.count, "malformed_reasons": bad.reasons}
    return Reading(datasets.Dataset.from_dict(clean), origin | facts | counts)


def _read_file(path: Path, config: TraceConfig, recipe: Recipe, bad: BadRecords) -> tuple[Columns, dict[str, Any]]:
    """Columns of a file: JSON where it begins like JSON, else CSV."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            beginning = file.read(4096).lstrip()[:1]
            if not beginning:
                raise UserError(f"trace.path={path}: is empty")
            if beginning not in "[{":
                form, columns = read_csv(path, config.format, bad)
                return columns, {"format": form.name, "tokenizer": None, "without_request": 0}
            file.seek(0)
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"trace.path={path}: cannot be read: {error}") from error
    return _read_records(json_records(text, bad), config, recipe, bad)


def _from_hub(config: TraceConfig) -> Any:
    try:
        return datasets.load_dataset(config.path, data_files=config.data_files, split=config.split)
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        raise UserError(
            f"trace.path={config.path}: no such file, and from the hub it does not load: {error}"
        ) from error


def _read_records(
    records: Records, config: TraceConfig, recipe: Recipe, bad: BadRecords
) -> tuple[Columns, dict[str, Any]]:
    form, records = detect(records, config.format, str(config.path))
    if isinstance(form, TextFormat):
        columns, facts = _count_texts(records, form, config, recipe, bad)
        return columns, {"format": form.name, "tokenizer": config.tokenizer} | facts
    columns = length_columns(records, form, config.keep_hash_ids, bad)
    return columns, {"format": form.name, "tokenizer": None, "without_request": 0}


def _count_texts(
    records: Records, form: TextFormat, config: TraceConfig, recipe: Recipe, bad: BadRecords
) -> tuple[Columns, dict[str, Any]]:
    """Columns of the texts' token counts; how many records hold no request; the prefix if there is one."""
    stated = list(well_formed(records, form, lambda record: form.texts(record, recipe), bad))
    if config.tokenizer is None:
        raise no_tokenizer(str(config.path), form.name)
    shots = few_shot(config) if form.few_shot else None
    ask = shots.prompt if shots else str
    rows = [
        {"record": number, "prompt": ask(each[0]), "output": each[1]} for number, each in stated if each is not None
    ]
    facts: dict[str, Any] = {"without_request": len(stated) - len(rows)}
    if not rows:
        return Columns([], [], []), facts
    tokenizer = load_tokenizer(config.tokenizer)
    facts |= shots.facts(tokenizer) if shots else {}
    counted = count_tokens(datasets.Dataset.from_list(rows), tokenizer)
    return Columns(*(counted[key][:] for key in ("record", "prompt_tokens", "output_tokens"))), facts
