"""What the loader makes of a file, held against what is read in it by hand."""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from trace_makers import BAD, PREFIX, Stated, Verdict
from trace_mutations import TraceFile
from traces_by_hand import Expected, expected

from kvarena.errors import UserError
from kvarena.harness.trace import TraceConfig, load_trace, reading
from kvarena.harness.trace.recipes import recipe

SHOWN = 5  # reasons that a load tells in full
CONTEXT = 8000  # tokens: fewer than what half of the made records ask for
DROPPED_BY = ("without_request", "failed", "filtered", "over_long")


class Loaded(NamedTuple):
    """What was made of a file's records."""

    columns: dict[str, list]  # of the kept ones; record: their numbers, from 1
    read: int
    malformed: int
    dropped: int
    told: list[int]  # numbers of the bad ones whose reasons are told


def as_plain(value: object) -> object:
    """A number, or a list of them, as Python has them."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


@dataclass
class Loader:
    """Loads files from a folder, and says what is wrong with how they were loaded."""

    folder: Path
    tokenizer: str
    refused: int = 0
    loaded: int = 0
    records: int = 0
    written: int = 0
    patches: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def __post_init__(self) -> None:
        (self.folder / "prefix.json").write_text(json.dumps({"prefixes": {"1": {"text": PREFIX}}}))
        self.patches.setattr(reading, "load_tokenizer", cache(reading.load_tokenizer))  # once, not for each file

    def load(self, file: TraceFile, on_bad_record: str) -> Loaded:
        """Through a file on disk. Raises UserError."""
        found, facts = reading.read(self._config(file, on_bad_record), recipe("none", None))
        return Loaded(
            {name: [as_plain(each) for each in values] for name, values in found.items()},
            facts["read"],
            facts["malformed"],
            sum(facts.get(rule, 0) for rule in DROPPED_BY[:2]),
            [int(re.match(r"record (\d+): ", reason)[1]) for reason in facts["malformed_reasons"]],
        )

    def _config(self, file: TraceFile, on_bad_record: str) -> TraceConfig:
        self.written += 1
        path = self.folder / f"file{self.written % 2}"  # another than before, whatever a clock says of it
        path.write_bytes(file.content)
        return TraceConfig(
            path=str(path),
            format=file.format,
            time_unit=file.time_unit,
            on_bad_record=on_bad_record,
            tokenizer=self.tokenizer,
            keep_hash_ids=file.keep_hash_ids,
            examples=1,
            prefix_path=str(self.folder / "prefix.json"),
        )

    def complaints(self, file: TraceFile) -> list[str]:
        """Of a record that is not accounted for, or otherwise than with its own values."""
        right = expected(file)
        try:
            loaded = self.load(file, "skip")
        except UserError as error:
            self.refused += 1
            return [] if right.may_refuse else [f"refused: {error}"]
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        self.loaded += 1
        self.records += loaded.read
        if right.kind is None:
            return ["loaded, though it fits no format"]
        found = unaccounted(right, loaded)
        if loaded.malformed and not found:
            found = self._first_named(file, loaded.told[0])
        return found or self._filtered(file, loaded)

    def _first_named(self, file: TraceFile, first: int) -> list[str]:
        """With trace.on_bad_record=error."""
        try:
            self.load(file, "error")
        except UserError as error:
            return [] if f"record {first}:" in str(error) else [f"record {first} is the first bad one, not: {error}"]
        return [f"record {first} is bad, and does not stop the load"]

    def _filtered(self, file: TraceFile, loaded: Loaded) -> list[str]:
        """Within a context."""
        pairs = zip(loaded.columns["prompt_tokens"], loaded.columns["output_tokens"], strict=True)
        fitting = [pair for pair in pairs if sum(pair) <= CONTEXT]
        try:
            trace = load_trace(self._config(file, "skip"), max_tokens=CONTEXT)
        except UserError as error:
            return [f"refused, though {len(fitting)} fit: {error}"] if fitting else []
        facts = trace.provenance
        lost = sum(facts.get(rule, 0) for rule in (*DROPPED_BY, "malformed"))
        taken = [*zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)]
        right = taken == fitting and facts["read"] == loaded.read == len(taken) + lost
        return [] if right else [f"within {CONTEXT} tokens {taken} of {facts['read']}, {lost} lost, not {fitting}"]


def unaccounted(right: Expected, loaded: Loaded) -> list[str]:
    """What differs between what a file holds and what was read of it."""
    kept, total = loaded.columns["record"], loaded.read
    verdicts = _aligned(right, loaded)
    if len(verdicts) != total or len(kept) + loaded.malformed + loaded.dropped != total:
        counts = f"{len(kept)} kept + {loaded.malformed} bad + {loaded.dropped} dropped of {total}"
        return [f"{counts}, not of {len(verdicts)}"]
    if kept != sorted(set(kept)) or not set(kept) <= set(range(1, total + 1)):
        return [f"records {kept} of {total}"]
    fates = {number: each.fate for number, each in enumerate(verdicts, start=1)}
    lost = [number for number, fate in fates.items() if fate == "kept" and number not in kept]
    bad = [number for number, fate in fates.items() if fate != "dropped" and number not in kept]
    if loaded.dropped != total - len(kept) - len(bad):  # some that are written oddly were
        bad = [number for number in bad if verdicts[number - 1] != ("either", None) or number in loaded.told]
    wrong = [f"record {number} is lost: {verdicts[number - 1]}" for number in lost]
    if loaded.told != bad[:SHOWN]:
        wrong.append(f"bad are {bad}, told is of {loaded.told}")
    stated = [verdicts[number - 1].stated for number in kept]
    if None in stated:
        return [*wrong, f"kept are {kept}, though of {verdicts}"]
    return wrong + _other_values(right, [each for each in stated if each is not None], loaded.columns)


def _aligned(right: Expected, loaded: Loaded) -> list[Verdict]:
    """A verdict for each record; behind what is broken, that of the next one with the lengths that were read."""
    if right.beyond is None:
        return right.verdicts
    columns, rest = loaded.columns, list(right.beyond)
    read = dict(
        zip(columns["record"], zip(columns["prompt_tokens"], columns["output_tokens"], strict=True), strict=True)
    )

    def fits(verdict: Verdict, number: int) -> bool:
        if number not in read:
            return verdict.stated is None and verdict != BAD
        return verdict.stated is not None and verdict.stated[:2] == read[number]

    further = []
    for number in range(len(right.verdicts) + 1, max(loaded.read, len(right.verdicts) + 1) + 1):
        at = next((at for at, each in enumerate(rest) if number not in loaded.told and fits(each, number)), None)
        further.append(BAD if at is None else rest[at])
        del rest[: 0 if at is None else at + 1]
    return right.verdicts + further + [BAD] * (BAD not in further)  # something must say that the array is broken


def _other_values(right: Expected, stated: list[Stated], columns: dict[str, list]) -> list[str]:
    """Of the kept records."""
    right_values = {
        "prompt_tokens": [each.prompt for each in stated],
        "output_tokens": [each.output for each in stated],
    }
    if "hash_ids" in columns:
        right_values["hash_ids"] = [list(each.ids or ()) for each in stated]
    wrong = [f"{name} {columns[name]}, not {value}" for name, value in right_values.items() if columns[name] != value]
    if not _same_groups(columns.get("conversation_id"), [each.conversation for each in stated]):
        wrong.append(f"conversations {columns.get('conversation_id')}, not {[each.conversation for each in stated]}")
    times = [None if each.stamp is None else each.stamp * right.unit for each in stated]
    if "arrival_s" not in columns:
        return wrong if not any(times) else [*wrong, f"no arrivals, not {times}"]
    first = 0.0
    if right.kind.from_first and times and times[0] is not None:  # a bad record may have been the first
        first = times[0] - columns["arrival_s"][0]
        stamps = [each.stated.stamp for each in (*right.verdicts, *(right.beyond or ())) if each.stated]
        if not any(stamp is not None and abs(first - stamp * right.unit) < 2e-6 for stamp in stamps):
            wrong.append(f"arrivals count from {first}, not from one of {stamps}")
    if not all(
        time is not None and abs(time - first - read) < 2e-6
        for time, read in zip(times, columns["arrival_s"], strict=True)
    ):
        wrong.append(f"arrivals {columns['arrival_s']}, not {times} less {first}")
    return wrong


def _same_groups(numbers: list[int] | None, names: list[str]) -> bool:
    """Whether records have one number where they have one name; without a name each has its own."""
    if numbers is None:
        return not any(names)
    distinct = [name or at for at, name in enumerate(names)]
    return len(set(zip(numbers, distinct, strict=True))) == len(set(numbers)) == len(set(distinct))
