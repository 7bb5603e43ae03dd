"""What a user may set: the groups of conf/, their schemas, and helpful refusals.

Allocators and kernels have no files there: their own say which there are, and a dataclass their defaults.

Hydra composes conf/, but it accepts unknown keys as `+key` and `++key`, and its refusals do not say what exists. So
every override is checked by name before Hydra composes (`check_overrides`), and every group is merged into its
dataclass afterwards (`typed`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kvarena.allocators.registry import allocator_names, preset
from kvarena.errors import UserError
from kvarena.harness.kinds import is_of, kind_of
from kvarena.harness.paths import CONF
from kvarena.kernels.registry import kernel_names

ALL = "all"  # allocator=all, kernel=all: whatever the experiment's systems use
AUTO = "auto"  # model=auto, device=auto: whatever the machine suggests
CLOCKS = ("measured", "modelled")
GROUPS = (
    "experiment", "model", "trace", "arrival", "decoding", "scheduler", "engine", "device", "allocator", "kernel",
)  # fmt: skip
_IN_QUOTES = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
T = TypeVar("T")
PLAIN_KEYS = ("clock", "threads", "systems")  # keys of config.yaml that are no group


def names(group: str) -> list[str]:
    """Names that exist in a group."""
    return sorted(_in_code(group) or (path.stem for path in (CONF / group).glob("*.yaml")))


def load(group: str, name: str) -> DictConfig:
    """What one choice of a group states; its schema has the rest. Raises UserError with the names that exist."""
    path: Path = CONF / group / f"{name}.yaml"
    stated = _in_code(group).get(name)
    if stated is None and not path.is_file():
        raise UserError(f"{group}={name}: no such {group}. There are: {', '.join(names(group))}")
    config = OmegaConf.create(stated or parsed(path))
    assert isinstance(config, DictConfig)
    config.pop("defaults", None)  # conf/base/, for Hydra: it refuses overrides of keys that no file has
    return config


def _in_code(group: str) -> dict[str, dict[str, Any]]:
    """The choices of a group that no file states, and their fields with the defaults."""
    if group == "allocator":
        return {ALL: {"name": ALL}} | {name: asdict(preset(name)) for name in allocator_names()}
    return {name: {"name": name} for name in (ALL, *kernel_names())} if group == "kernel" else {}


def tell_hydra() -> None:
    """Let Hydra compose those choices as if they had files."""
    from hydra.core.config_store import ConfigStore

    for group in ("allocator", "kernel"):
        for name, stated in _in_code(group).items():
            ConfigStore.instance().store(name, stated, group)


@cache  # parsing takes most of the time of a resolution, and nobody changes the files meanwhile
def parsed(path: Path) -> Any:
    """What a file of conf/ holds, as plain data. Not to be changed."""
    return OmegaConf.to_container(OmegaConf.load(path))


def typed(schema: type[T], node: object, where: str) -> T:
    """`node` as an instance of the dataclass `schema`. Raises UserError for unknown keys and wrong types."""
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except ConfigKeyError as error:
        raise no_such_key(f"{where}.{error.full_key or error.key}", field_names(schema, where)) from error
    except (OmegaConfBaseException, ValueError) as error:
        for key, value in node.items() if isinstance(node, Mapping) else ():
            _check_alone(schema, str(key), value, where)
        at = "." + key if (key := str(getattr(error, "full_key", None) or "")) else ""
        raise UserError(f"{where}{at}: {str(error).splitlines()[0]}") from error
    for name, hint in get_type_hints(schema).items():  # OmegaConf lets a list pass where a mapping has words
        if not is_of(hint, value := getattr(made, name)):
            raise UserError(f"{where}.{name}={value}: must be {kind_of(hint)}")
    return cast(T, made)


def _check_alone(schema: type, key: str, value: object, where: str) -> None:
    """Raises UserError where this value of a field alone is what does not fit."""
    try:
        OmegaConf.merge(OmegaConf.structured(schema), {key: value})
    except (OmegaConfBaseException, ValueError) as error:
        full_key = str(getattr(error, "full_key", None) or key)
        if "." in full_key:  # of a field of its own
            raise UserError(f"{where}.{full_key}: {str(error).splitlines()[0]}") from error
        raise UserError(f"{where}.{key}={value}: must be {kind_of(get_type_hints(schema)[key])}") from error


def changed(config: Any, group: str, free: Sequence[str] = ()) -> dict[str, Any]:
    """What a choice of a group has otherwise than the file of its name, but for fields that are `free` to differ.

    Empty where there is no such file.
    """
    if config.name not in names(group):
        return {}
    schema: Any = type(config)
    filed = _as_filed(schema, group, config.name)
    others = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in free}
    return {key: value for key, value in others.items() if value != getattr(filed, key)}


@cache
def _as_filed(schema: Any, group: str, name: str) -> Any:
    return typed(schema, load(group, name), group)


def field_names(schema: type, where: str) -> list[str]:
    """Dotted names of a schema's fields."""
    return [f"{where}.{field.name}" for field in fields(schema)]


def no_such_key(key: str, allowed: Sequence[str]) -> UserError:
    """The refusal of an unknown key."""
    return UserError(f"{key}: no such key. There are: {', '.join(allowed)}")


def check_overrides(overrides: Sequence[str], schema_of: Callable[[str, str | None], type | None]) -> None:
    """Refuse, by name, overrides of what does not exist; `schema_of(group, choice)` gives a group's dataclass.

    Values are left to `typed`. Sweeps (`a=1,2`) are checked choice by choice.
    """
    choices = {key: value.split(",") for key, value in map(_split, overrides) if key in GROUPS}
    for override in overrides:
        _check_it_sets(override, choices.get("experiment", [""])[0])
    for group, wanted in choices.items():
        for choice in wanted:
            if choice not in names(group):
                raise UserError(f"{group}={choice}: no such {group}. There are: {', '.join(names(group))}")
    for key, value in map(_split, overrides):
        root, _, rest = key.partition(".")
        if root == "hydra" or "/" in root or "@" in root:
            continue
        if root not in (*GROUPS, *PLAIN_KEYS, "params"):
            raise no_such_key(root, [*GROUPS, *PLAIN_KEYS, "params"])
        if rest and root in (*PLAIN_KEYS, "experiment"):
            raise _no_parts(root, rest)
        if key == "params":
            raise UserError("params: is a group of keys; write each of them: params.KEY=VALUE")
        owners: Sequence[str | None] = choices.get(root) or [None]
        for owner in owners if rest else ():
            if root in ("allocator", "kernel") and owner in (None, ALL):
                raise UserError(
                    f"{root}.{rest}: whose? Set it together with {root}=NAME, which keeps the systems that use it. "
                    f"There are: {', '.join(name for name in names(root) if name != ALL)}"
                )
            _check_path(schema_of(root, owner), root, rest)
            _check_shape(schema_of(root, owner), key, rest, value)


def _check_it_sets(override: str, experiment: str) -> None:
    """Refuse what Hydra takes and what sets nothing: a deletion, after which a default is back; an empty mapping."""
    key, value = _split(override)
    if override.startswith("~") and not key.startswith("hydra"):
        raise UserError(f"{override}: no key can be taken away; leave it out for its default, or write {key}=VALUE")
    if re.search(r"\{\s*\}", _IN_QUOTES.sub("", value)) and not (value == "{}" and _is_null(key, experiment)):
        raise UserError(f"{key}={value}: an empty mapping is merged into the file's, and changes nothing")


def _is_null(key: str, experiment: str) -> bool:
    """Whether an experiment's file leaves a key of `params` null, so that an empty mapping says: none."""
    of_params = key.startswith("params.") and experiment in names("experiment")
    return of_params and OmegaConf.select(load("experiment", experiment), key) is None


def _check_path(schema: type | None, where: str, path: str) -> None:
    if schema is None:
        return
    name, _, rest = path.partition(".")
    if name not in {field.name for field in fields(schema)}:
        raise no_such_key(f"{where}.{name}", field_names(schema, where))
    inner = get_type_hints(schema).get(name)
    if rest and isinstance(inner, type) and is_dataclass(inner):
        _check_path(inner, f"{where}.{name}", rest)
    elif rest and not _may_have_parts(inner):
        raise _no_parts(f"{where}.{name}", rest)


def _check_shape(schema: type | None, key: str, name: str, value: str) -> None:
    """Refuse a list where a mapping belongs, and a mapping where a list does: Hydra cannot merge them."""
    hint = get_type_hints(schema).get(name) if schema else None
    mapping = _may_have_parts(hint)
    if hint is not None and value[:1] == ("[" if mapping else "{") and hint is not Any:
        raise UserError(f"{key}={value}: must be {kind_of(hint)}")


def _may_have_parts(hint: Any) -> bool:
    """Whether a value of this type may have keys of its own: a mapping, or anything."""
    return hint is Any or dict in (hint, get_origin(hint)) or any(map(_may_have_parts, get_args(hint)))


def _no_parts(key: str, rest: str) -> UserError:
    return UserError(f"{key}.{rest}: {key} has no keys of its own; write it whole: {key}=VALUE")


def check_once(overrides: Sequence[str]) -> None:
    """Refuse a key that is written twice: one of its values would be dropped without a word."""
    values: dict[str, str] = {}
    for key, value in map(_split, overrides):
        if key in values:
            raise UserError(f"{key}: written twice, as {values[key]} and as {value}; write it once")
        values[key] = value


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key.strip(), value.strip()


def on_auto(overrides: Sequence[str]) -> list[str]:
    """The overrides, as Hydra takes them: a field of what the profile names, or below a null that the profile fills.

    No file has such a field, so that Hydra would propose `+model.tp=4` instead of `model.tp=4`. It also wants quotes
    around `vattention/fa2{page_group: 64KB}`, which a shell may have taken away.
    """
    chosen = {key for key, _ in map(_split, overrides)}
    open_groups = tuple(f"{group}." for group in ("model", "device") if group not in chosen)

    def is_open(key: str, value: str) -> bool:
        has_parts = key.count(".") > 1 or value.startswith("{")
        return key.startswith(open_groups) or (key.startswith("params.") and has_parts)

    opened = [f"++{o.lstrip('+')}" if is_open(*_split(o)) and not o.startswith("~") else o for o in overrides]
    return [_quoted(o) if _split(o)[0] == "systems" else o for o in opened]


def _quoted(override: str) -> str:
    """`systems=` with quotes around what has options in braces. Raises UserError for other braces."""
    quoted = re.sub(r"(?<![\w./{\"'-])[\w./-]+\{[^{}]*\}", r'"\g<0>"', override)
    if re.search(r"[{}]", _IN_QUOTES.sub("", quoted)):
        raise UserError(
            f"{override}: options are written as in 'systems=[paged/fa2,vattention/fa2{{page_group: 64KB}}]'"
        )
    return quoted


def keys_of(overrides: Sequence[str]) -> tuple[str, ...]:
    """The keys that the command line names, dotted: `model`, `arrival.rate`. `model=auto` names none."""
    asked = (key for key, value in map(_split, overrides) if not (key in GROUPS and value == AUTO))
    return tuple(dict.fromkeys(asked))


def fields_set(group: str, overrides: Sequence[str]) -> DictConfig:
    """The fields of a group that the command line names, e.g. {block_size: 32} for `allocator.block_size=32`."""
    dotted = [o.lstrip("+") for o in overrides if o.lstrip("+").startswith(f"{group}.")]
    return OmegaConf.create(OmegaConf.from_dotlist(dotted).get(group) or {})
