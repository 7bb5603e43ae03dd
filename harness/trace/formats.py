"""The formats of public traces, as data: which fields they have, and what request a record states.

Length formats state token counts. Text formats state words, which a tokenizer has to count first.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kvarena.errors import UserError
from kvarena.harness.files.text_file import check_text
from kvarena.harness.trace.recipes import Recipe


class MalformedError(ValueError):
    """A record that is not what its format says; the message is the reason."""


CONVERSATION, HASH_IDS = "conversation_id", "hash_ids"  # fields that any record of lengths may have too
DATE = "date"  # a stamp that is no number, but a point in time as ISO 8601 writes it


@dataclass(frozen=True, slots=True)
class LengthFormat:
    """Names of the fields of a format that states token counts, and the units that it counts in (`units.py`).

    A record may also have a CONVERSATION (`turns.py`) and HASH_IDS.
    """

    name: str
    prompt: str
    output: str
    arrival: str
    time_unit: str = "s"  # of units.SECONDS, or DATE
    arrival_needed: bool = True
    from_first: bool = False  # its clock began before the trace: the first record arrives at 0
    block_tokens: int | None = None  # tokens of a block that an id of hash_ids stands for
    told_by: tuple[str, ...] = ()  # further fields, which tell it where nobody names it
    shared: bool = False  # its fields are other formats' too: unless it is named, its units are a guess
    zero_output_fails: bool = False  # an output of no token is a request that failed, and no fault of the record

    @property
    def required(self) -> tuple[str, ...]:
        """Fields that every record has."""
        return (self.prompt, self.output, self.arrival) if self.arrival_needed else (self.prompt, self.output)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A format that states text: `texts` gives (prompt, output), or None for a record that holds no request. An output
    may be a number of tokens.

    few_shot: the prompt is a question, to be asked behind an instruction and examples (few_shot.py).
    """

    name: str
    required: tuple[str, ...]
    texts: Callable[[Mapping[str, Any], Recipe], tuple[str, str | float] | None]
    few_shot: bool = False


Format = LengthFormat | TextFormat

_HUMAN = ("human", "user")  # names of speakers, in lower case: everybody writes them as he likes
_ASSISTANT = ("gpt", "chatgpt", "bing", "bard", "assistant", "model")
_SYSTEM = ("system",)  # says nothing that is asked or answered


def text_field(record: Mapping[str, Any], key: str) -> str:
    """A field that must be text, and such that can be written. Raises MalformedError."""
    if key not in record:
        raise MalformedError(f"no field {key}")
    value = record[key]
    if not isinstance(value, str):
        raise MalformedError(f"{key} is {shown(value)}, not text")
    try:
        check_text(value)
    except ValueError as error:
        raise MalformedError(f"{key}: {error}") from error
    return value


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _alpaca(record: Mapping[str, Any], recipe: Recipe) -> tuple[str, str]:
    """Instruction and input with a space between, also where the input is empty: so PagedAttention counted."""
    given = text_field(record, "input") if "input" in record else ""
    return f"{text_field(record, 'instruction')} {given}", text_field(record, "output")


def _first_round(
    record: Mapping[str, Any], recipe: Recipe, turns_key: str, speaker_key: str, text_key: str
) -> tuple[str, str] | None:
    """A question and the answer right behind it, the first of a conversation; None where it has none."""
    turns = record[turns_key]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise MalformedError(f"{turns_key} is {shown(turns)}, not a list of turns")
    if recipe.any_first_turn:
        return (text_field(turns[0], text_key), text_field(turns[1], text_key)) if len(turns) >= 2 else None
    asked = False
    for i, turn in enumerate(turns):
        speaker = text_field(turn, speaker_key)
        if asked and speaker.lower() in _ASSISTANT:
            return text_field(turns[i - 1], text_key), text_field(turn, text_key)
        if speaker.lower() not in (*_HUMAN, *_ASSISTANT, *_SYSTEM):
            known = ", ".join(_HUMAN + _ASSISTANT + _SYSTEM)
            raise MalformedError(f"{speaker_key} is {shown(speaker)}, no speaker that is known: {known}")
        asked = speaker.lower() in _HUMAN
    return None


def _sharegpt(record: Mapping[str, Any], recipe: Recipe) -> tuple[str, str] | None:
    return _first_round(record, recipe, "conversations", "from", "value")


def _messages(record: Mapping[str, Any], recipe: Recipe) -> tuple[str, str] | None:
    return _first_round(record, recipe, "messages", "role", "content")


def _wmt16(record: Mapping[str, Any], recipe: Recipe) -> tuple[str, str]:
    """The English sentence and its German reference, which says how long the answer is."""
    pair = record["translation"]
    if not isinstance(pair, Mapping):
        raise MalformedError(f"translation is {shown(pair)}, not a sentence by language")
    return text_field(pair, "en"), text_field(pair, "de")


def _guidellm(record: Mapping[str, Any], recipe: Recipe) -> tuple[str, float]:
    """A prompt, and how many tokens to answer it with."""
    output = record["output_tokens_count"]
    if isinstance(output, bool) or not isinstance(output, int | float):
        raise MalformedError(f"output_tokens_count is {shown(output)}, not a number")
    return text_field(record, "prompt"), output


_BLOCKS = ("input_length", "output_length", "timestamp")  # of Mooncake's, and of whoever followed it
FORMATS: tuple[Format, ...] = (  # the first that fits is taken
    TextFormat("sharegpt", ("conversations",), _sharegpt),
    TextFormat("alpaca", ("instruction", "output"), _alpaca),
    TextFormat("wmt16", ("translation",), _wmt16, few_shot=True),
    TextFormat("sharegpt", ("messages",), _messages),
    LengthFormat("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", DATE, from_first=True),  # 2023 and 2024
    LengthFormat("azure", "prompt_tokens", "output_tokens", "arrival_s"),
    LengthFormat("bailian", *_BLOCKS, "s", block_tokens=16, told_by=("chat_id", "parent_chat_id")),
    LengthFormat("mooncake", *_BLOCKS, "ms", block_tokens=512, told_by=(HASH_IDS,), shared=True),
    LengthFormat("guidellm", *_BLOCKS, "s", from_first=True, block_tokens=512, shared=True),
    TextFormat("guidellm", ("prompt", "output_tokens_count"), _guidellm),
    LengthFormat("guidellm", "prompt_tokens_count", "output_tokens_count", "timestamp", "s", False, from_first=True),
    LengthFormat("burstgpt", "Request tokens", "Response tokens", "Timestamp", from_first=True, zero_output_fails=True),
    LengthFormat("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at", arrival_needed=False),
    LengthFormat("splitwise", "prompt_size", "token_size", "arrival_timestamp", arrival_needed=False),
    LengthFormat("lengths", "prompt_tokens", "output_tokens", "arrival_s", arrival_needed=False),
)


def candidates(name: str | None) -> list[Format]:
    """The formats of that name, all if None. Raises UserError with the names there are."""
    found = [each for each in FORMATS if name in (None, each.name)]
    if not found:
        raise UserError(f"trace.format={name}: no such format. There are: {', '.join({f.name: 0 for f in FORMATS})}")
    return found


def fitting(fields: Collection[str], name: str | None) -> Format | None:
    """The format that these fields fit, of that name if one is given."""
    return next((each for each in candidates(name) if set(_telling(each, name)) <= set(fields)), None)


def _telling(form: Format, name: str | None) -> tuple[str, ...]:
    """The fields that a record of this format has, and by which it is told where nobody names it."""
    told_by = form.told_by if name is None and isinstance(form, LengthFormat) else ()
    return (*form.required, *told_by)


def no_format(fields: Collection[str], name: str | None, source: str) -> UserError:
    """The refusal of a source whose fields fit no format."""
    needed = "; ".join(f"{each.name}: {', '.join(_telling(each, name))}" for each in candidates(name))
    stated = ", ".join((name if name.isprintable() else repr(name))[:40] for name in list(fields)[:40])
    return UserError(f"{source}: its fields ({stated or 'none'}) fit no format. Needed are: {needed}")
