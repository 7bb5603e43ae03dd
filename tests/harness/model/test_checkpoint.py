"""Checkpoints from a folder, whole and in shards, and what is said of broken ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvarena.errors import UserError
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import build_model
from kvarena.harness.model.checkpoint import config_of_checkpoint, load_checkpoint
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.parameters import list_parameters

CPU = torch.device("cpu")
HF_CONFIG = {
    "tiny-llama": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "tiny-opt": {
        "model_type": "opt",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_dim": 256,
        "vocab_size": 256,
        "max_position_embeddings": 2048,
    },
}


def hf_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random tensors under Hugging Face's names."""
    parts = [(part, p.shape[1:]) for p in list_parameters(config) for part in p.parts]
    return {part.source: torch.rand(part.rows, *rest) for part, rest in parts}


def write_config(folder: Path, name: str, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG[name] | changes))


@pytest.fixture(params=["tiny-llama", "tiny-opt"])
def saved(request, tmp_path):
    """A checkpoint in one file: the config that reads it, and its tensors."""
    config = load_preset(request.param, checkpoint=str(tmp_path))
    tensors = hf_tensors(config)
    write_config(tmp_path, request.param)
    save_file(tensors, tmp_path / "model.safetensors")
    return config, tensors


def save_in_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Replace the one file by three and an index; returns their names."""
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{n + 1}-of-00003.safetensors" for n in range(3)]
    weight_map = {name: files[index % 3] for index, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_projections_of_one_input_are_stacked_in_order(saved):
    config, tensors = saved
    weights = load_checkpoint(config, CPU)
    for parameter in list_parameters(config):
        expected = torch.cat([tensors[part.source] for part in parameter.parts])
        assert torch.equal(weights[parameter.name], expected)


def test_weights_come_in_the_dtype_of_the_config(saved):
    config, tensors = saved
    weights = load_checkpoint(replace(config, dtype="bfloat16"), CPU)
    norm = "model.norm.weight" if config.family == "llama" else "model.decoder.final_layer_norm.weight"
    ours = weights["final_norm" if config.family == "llama" else "final_norm.weight"]
    assert torch.equal(ours, tensors[norm].bfloat16())


def test_shards_hold_the_same_weights_as_one_file(saved, tmp_path):
    config, tensors = saved
    whole = load_checkpoint(config, CPU)
    save_in_shards(tmp_path, tensors)
    sharded = load_checkpoint(config, CPU)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_sizes_are_read_from_the_checkpoint(saved, tmp_path):
    config, _ = saved
    found = config_of_checkpoint(str(tmp_path), seed=config.seed)
    assert found == replace(config, name=tmp_path.name)
    assert build_model(found).config == found


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_rope_theta_is_found_where_old_and_new_files_keep_it(rope, tmp_path):
    write_config(tmp_path, "tiny-llama", **rope)
    assert config_of_checkpoint(str(tmp_path)).rope_theta == 5e5


def test_a_checkpoint_of_other_sizes_is_refused(saved):
    config, _ = saved
    with pytest.raises(UserError, match=r"model.num_layers=3 .* 2.*model=checkpoint"):
        build_model(replace(config, num_layers=3))


def test_a_missing_tensor_is_named(saved, tmp_path):
    config, tensors = saved
    name = next(name for name in tensors if "layers.1" in name and "k_proj" in name)
    save_file({other: t for other, t in tensors.items() if other != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} is missing"):
        build_model(config)


def test_a_wrong_shape_is_named_with_both_shapes(saved, tmp_path):
    config, tensors = saved
    name = next(name for name in tensors if "layers.0" in name and "q_proj.weight" in name)
    save_file(tensors | {name: torch.zeros(32, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor {name} has shape \(32, 64\), expected \(64, 64\)"):
        build_model(config)


def test_a_missing_shard_is_named(saved, tmp_path):
    config, tensors = saved
    files = save_in_shards(tmp_path, tensors)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]}: no such file .*index.json.*holds: config.json, {files[0]}"):
        build_model(config)


def test_a_truncated_file_is_refused(saved, tmp_path):
    config, _ = saved
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: not a safetensors file"):
        build_model(config)


def test_weights_in_another_format_are_refused(tmp_path):
    write_config(tmp_path, "tiny-llama")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"model.safetensors.*config.json, pytorch_model.bin"):
        build_model(load_preset("tiny-llama", checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: holds a list"),
        ('{"model_type": "gpt2"}', "config.json: model_type=gpt2.*llama, opt"),
        ('{"num_hidden_layers": 2}', "config.json: model_type=None.*llama, opt"),
        (
            '{"model_type": "opt", "hidden_size": 64}',
            "config.json: num_attention_heads=None, expected a positive integer",
        ),
        (
            '{"model_type": "opt", "hidden_size": 64, "num_attention_heads": "four"}',
            "config.json: num_attention_heads=four, expected a positive integer",
        ),
    ],
)
def test_a_broken_config_is_refused_by_key(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        config_of_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tiny-llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type=llama3 is not supported"),
        ("tiny-llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported; only silu is"),
        ("tiny-llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("tiny-opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
        ("tiny-opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32 is not supported; only 64 is"),
    ],
)
def test_what_our_models_do_not_compute_is_refused(name, changes, message, tmp_path):
    write_config(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message):
        config_of_checkpoint(str(tmp_path))


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file .*holds: nothing"):
        config_of_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        config_of_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no such folder"):
        config_of_checkpoint("absent")


def test_a_hub_name_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.checkpoint=owner/absent-model"):
        config_of_checkpoint("owner/absent-model")


def test_a_hub_name_is_downloaded_weights_and_json_alone(saved, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    config, _ = saved
    weights = load_checkpoint(replace(config, checkpoint="owner/tiny"), CPU)
    assert asked == {"owner/tiny": ["*.safetensors", "*.json"]}
    assert len(weights) == len(list_parameters(config))
