"""Prompts by example (PagedAttention section 6.4): an instruction and examples, the same in all, then a question.

They stand in a file of their own: `{"prefixes": {"1": {"text": "..."}, "5": {"text": "..."}}}`, keyed by the number of
examples. Each text holds the instruction too.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.errors import UserError
from kvarena.harness.files.local_file import local_file
from kvarena.harness.files.text_file import check_text, opened
from kvarena.harness.trace.config import TraceConfig

BESIDE = "wmt16_prefix.json"  # its name where trace.prefix_path is null


class FewShot(NamedTuple):
    """What all prompts begin with."""

    source: str
    examples: int
    prefix: str

    def prompt(self, question: str) -> str:
        """The question behind the prefix, left open where its answer goes, as the examples have it."""
        return f"{self.prefix}{question} =>"

    def facts(self, tokenizer: Any) -> dict[str, Any]:
        """For the trace's provenance; tokens of the prefix alone, special tokens among them."""
        return {
            "examples": self.examples,
            "prefix_path": self.source,
            "prefix_sha256": hashlib.sha256(self.prefix.encode()).hexdigest(),
            "prefix_tokens": len(tokenizer(self.prefix, verbose=False)["input_ids"]),
        }


def few_shot(config: TraceConfig) -> FewShot:
    """The prefix of `config.examples` examples. Raises UserError: no number set, no such file, no such prefix."""
    if config.examples is None:
        raise UserError(
            f"{config.path} holds translations, whose prompts begin with examples: set trace.examples to their number, "
            "as trace=wmt16_1shot and trace=wmt16_5shot do"
        )
    path = prefix_path(config)
    if path is None:
        raise UserError(
            f"trace.prefix_path: {_prefix_name(config)}: no such file; it holds what all prompts begin with (null: "
            f"{BESIDE} beside trace.path)"
        )
    prefixes = _prefixes(path)
    entry = prefixes.get(str(config.examples))
    if entry is None:
        raise UserError(f"trace.examples={config.examples}: {path} has prefixes of {', '.join(prefixes)} examples")
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}, prefixes.{config.examples}.text: must be the text that all prompts begin with")
    try:
        check_text(text)
    except ValueError as error:
        raise UserError(f"{path}, prefixes.{config.examples}.text: {error}") from error
    return FewShot(str(path), config.examples, text)


def prefix_path(config: TraceConfig) -> Path | None:
    """The file of the prefixes, if it is there. Raises UserError for what stands there and cannot be read."""
    return local_file(_prefix_name(config), "trace.prefix_path")


def _prefix_name(config: TraceConfig) -> str:
    """The one named, else the one beside the trace."""
    return config.prefix_path or str(Path(str(config.path)).parent / BESIDE)


def _prefixes(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"trace.prefix_path: {path}: cannot be read: {error}") from error
    prefixes = content.get("prefixes") if isinstance(content, dict) else None
    if not isinstance(prefixes, dict) or not prefixes:
        raise UserError(f"{path}, prefixes: must be an object of texts by their number of examples")
    return prefixes
