"""A trace's records, from a local file or the hub: checked one by one, and what the clean ones state."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.errors import UserError
from kvarena.harness.files.content import check_unchanged, sha256
from kvarena.harness.files.hub_name import is_hub_name
from kvarena.harness.files.json_file import json_records
from kvarena.harness.files.local_file import local_file
from kvarena.harness.files.parquet_file import is_parquet, parquet_records
from kvarena.harness.files.text_file import opened
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns, check_columns
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.csv_file import read_csv
from kvarena.harness.trace.few_shot import few_shot
from kvarena.harness.trace.formats import HASH_IDS, TextFormat
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.records import Records, detect, length_columns, looks_like, well_formed
from kvarena.harness.trace.texts import Texts, count_tokens, load_tokenizer, no_tokenizer


class Reading(NamedTuple):
    """What a source holds."""

    # record (its number), prompt_tokens, output_tokens; arrival_s, conversation_id, hash_ids where the source has them
    clean: dict[str, Any]  # of arrays and lists, [n]
    facts: dict[str, Any]  # for the trace's provenance


def read(config: TraceConfig, recipe: Recipe) -> Reading:
    """Read `config.path`. Raises UserError: no such file, no known format, text without a tokenizer, a bad record."""
    source = str(config.path)
    path = local_file(source)
    bad = BadRecords(source, config.on_bad_record)
    if path is not None:
        origin: dict[str, Any] = {"path": str(path), "sha256": sha256(path)}
        columns, facts = _read_file(path, config, recipe, bad)
        check_unchanged({str(path): origin["sha256"]})
    elif not is_hub_name(source):
        raise UserError(f"trace.path={source}: no such file (nor is it a hub's owner/name)")
    else:
        origin = {"hub": source, "data_files": config.data_files, "split": config.split}
        columns, facts = _read_records(_from_hub(config), config, recipe, bad)
    clean, counted = check_columns(columns, config, bad)
    bad.report()
    if config.keep_hash_ids and HASH_IDS not in clean:
        raise UserError(f"trace.keep_hash_ids: {source} has none; Mooncake's and Bailian's JSON lines do")
    seen = len(clean["record"]) + bad.count + facts["without_request"] + counted.get("failed", 0)
    counts = {"read": seen, "malformed": bad.count, "malformed_reasons": bad.reasons}
    return Reading(clean, origin | facts | counted | counts)


def _read_file(path: Path, config: TraceConfig, recipe: Recipe, bad: BadRecords) -> tuple[Columns, dict[str, Any]]:
    """Columns of a file, whatever it is called: parquet, JSON where it begins like JSON, else CSV."""
    if is_parquet(path):
        return _read_records(parquet_records(path, bad.add), config, recipe, bad)
    with opened(path) as file:
        beginning = next(filter(str.strip, iter(partial(file.read, 4096), "")), "").lstrip()
        if not beginning:
            raise UserError(f"trace.path={path}: is empty")
        file.seek(0)
        if beginning[0] not in "[{":
            form, columns = read_csv(file, config, bad)
            return columns, {"format": form.name, "tokenizer": None, "without_request": 0}
        text = file.read()
    records = json_records(text, bad.add, lambda value: looks_like(value, config.format))
    return _read_records(records, config, recipe, bad)


def _from_hub(config: TraceConfig) -> Records:
    import datasets  # takes a second

    try:
        yield from enumerate(
            datasets.load_dataset(config.path, data_files=config.data_files, split=config.split), start=1
        )
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        raise UserError(
            f"trace.path={config.path}: no such file, and from the hub it does not load: {error}"
        ) from error


def _read_records(
    records: Records, config: TraceConfig, recipe: Recipe, bad: BadRecords
) -> tuple[Columns, dict[str, Any]]:
    form, records = detect(records, config.format, bad)
    if isinstance(form, TextFormat):
        columns, facts = _count_texts(records, form, config, recipe, bad)
        return columns, {"format": form.name, "tokenizer": config.tokenizer} | facts
    columns = length_columns(records, form, config.keep_hash_ids is not False, bad)
    return columns, {"format": form.name, "tokenizer": None, "without_request": 0}


def _count_texts(
    records: Records, form: TextFormat, config: TraceConfig, recipe: Recipe, bad: BadRecords
) -> tuple[Columns, dict[str, Any]]:
    """Columns of the texts' token counts; how many records hold no request; the prefix if there is one."""
    stated = list(well_formed(records, form, lambda record: form.texts(record, recipe), bad))
    bad.stop()  # before a tokenizer is asked for
    if config.tokenizer is None:
        raise no_tokenizer(str(config.path), form.name)
    shots = few_shot(config) if form.few_shot else None
    ask = shots.prompt if shots else str
    texts = [Texts(number, ask(each[0]), each[1]) for number, each in stated if each is not None]
    facts: dict[str, Any] = {"without_request": len(stated) - len(texts)}
    if not texts:
        return Columns([], [], []), facts
    tokenizer = load_tokenizer(config.tokenizer)
    facts |= shots.facts(tokenizer) if shots else {}
    return count_tokens(texts, tokenizer, bad), facts
