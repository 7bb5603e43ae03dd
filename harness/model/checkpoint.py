"""Checkpoints of Hugging Face: config.json and safetensors, in a local folder or on the hub."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvarena.errors import UserError
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.hf_config import model_config
from kvarena.harness.model.weights import Weights, weights_from_hf

_SIZES = (
    *("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size"),
    *("rope_theta", "norm_eps", "tied_embeddings", "biases"),
)


def load_checkpoint(config: ModelConfig, device: torch.device) -> Weights:
    """Load `config.checkpoint`, in `config.dtype`.

    Raises UserError for a missing folder or file, a checkpoint of other sizes than `config`, a missing tensor, or one
    of a wrong shape.
    """
    assert config.checkpoint is not None
    folder = find_checkpoint(config.checkpoint)
    _require_same_sizes(config, _config_in(folder, config.dtype))
    return weights_from_hf(config, SafetensorsFolder(folder), device)


def config_of_checkpoint(checkpoint: str, dtype: str = "float32", seed: int = 0) -> ModelConfig:
    """Read a model's sizes from its checkpoint. Raises UserError where it is missing, or not a model that we have."""
    return replace(_config_in(find_checkpoint(checkpoint), dtype), checkpoint=checkpoint, seed=seed)


def find_checkpoint(checkpoint: str) -> Path:
    """Folder of a checkpoint: `checkpoint` itself if it exists, else a download of that name from the hub.

    Raises UserError where it is neither.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise UserError(f"model.checkpoint={checkpoint}: no such folder (and not a hub name, which is owner/model)")
    return _download(checkpoint)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # a dependency of datasets; half a second, for hub names alone

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as failure:  # what it documents: no network, no such model, no access, bad name
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise UserError(
            f"model.checkpoint={name}: neither a local folder nor to be had from the hub: {reason}"
        ) from failure


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for: one file, or shards with an index."""

    def __init__(self, folder: Path) -> None:
        opened = [_open(path) for path in _files(folder)]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (a file is no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [_existing(folder / "model.safetensors", "model.checkpoint")]
    names = _read_json(index).get("weight_map", {}).values()
    return [_existing(folder / name, f"{index.name} names it") for name in sorted(set(names))]


def _existing(path: Path, why: str) -> Path:
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in path.parent.iterdir())) or "nothing"
        raise UserError(f"{path}: no such file ({why}); the folder holds: {present}")
    return path


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as damage:
        raise UserError(f"{path}: not a safetensors file: {damage}") from damage


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_existing(path, "model.checkpoint").read_text())
    except ValueError as damage:
        raise UserError(f"{path}: not valid JSON: {damage}") from damage
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def _config_in(folder: Path, dtype: str) -> ModelConfig:
    path = folder / "config.json"
    return model_config(_read_json(path), path, dtype)


def _require_same_sizes(config: ModelConfig, found: ModelConfig) -> None:
    """A checkpoint must be the model that the config names: else its figures would wear another model's name."""
    for key in _SIZES:
        ours, theirs = getattr(config, key), getattr(found, key)
        if ours != theirs:
            hint = "model=checkpoint takes the sizes of the checkpoint"
            raise UserError(f"model.{key}={ours} ({config.name}), but {config.checkpoint} has {theirs}; {hint}")
