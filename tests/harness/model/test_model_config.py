"""Sizes, parameter counts, KV bytes and shards of the models in conf/model/."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.harness.model import ModelConfig, load_preset, preset_names
from kvarena.harness.paths import CONF

KIB = 1024
PUBLISHED = {  # parameters as the papers' facts count them, in billions; KV bytes per token over all layers
    "yi-6b": (6.061, 64 * KIB),
    "llama-3-8b": (8.030, 128 * KIB),
    "yi-34b": (34.389, 240 * KIB),
    "opt-13b": (12.853, 819_200),
    "opt-66b": (65.72, 2_359_296),
    "opt-175b": (174.60, 4_718_592),
    "llama-13b": (13.016, 819_200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_parameters_and_kv_bytes(name):
    billions, kv_bytes = PUBLISHED[name]
    config = load_preset(name)
    digits = 2 if billions in (65.72, 174.60) else 3
    assert round(config.num_parameters() / 1e9, digits) == billions
    assert config.kv_layout().token_bytes == kv_bytes
    assert config.weight_bytes == 2 * config.num_parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_textbook_formula(name):
    c = load_preset(name)
    h, f, heads, kv = c.hidden_size, c.ffn_size, c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    if c.family == "llama":
        layer = h * (heads + 2 * kv) + heads * h + 3 * h * f + 2 * h
        expected = c.num_layers * layer + 2 * c.vocab_size * h + h
    else:
        layer = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h
        expected = c.num_layers * layer + c.vocab_size * h + (c.max_tokens + 2) * h + 2 * h
    assert c.num_parameters() == expected


def test_a_step_reads_all_but_the_gathered_tables():
    llama, opt = load_preset("llama-3-8b"), load_preset("opt-13b")
    assert llama.num_parameters() - llama.step_parameters() == llama.vocab_size * llama.hidden_size
    assert (
        opt.num_parameters() - opt.step_parameters() == (opt.max_tokens + 2) * opt.hidden_size
    )  # tied: embedding read


@pytest.mark.parametrize("name", ["bench-llama", "bench-opt"])
def test_attention_weighs_at_least_30_percent_of_a_cpu_decode_step(name):
    config, batch, context = load_preset(name), 32, 1024
    projections_s = 2 * batch * config.step_parameters() / 60e9
    attention_s = batch * context * config.kv_layout().token_bytes / 15e9
    assert attention_s / (attention_s + projections_s) > 0.5
    assert attention_s / 2 / (attention_s / 2 + projections_s) > 0.3  # at half the context


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_filed_under_its_name_and_spells_out_every_field(name):
    config = load_preset(name)
    assert config.name == name
    spelled = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    assert list(spelled) == list(ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize(("name", "tp"), [("llama-3-8b", 2), ("yi-34b", 2), ("opt-66b", 4), ("opt-175b", 8)])
def test_shards_share_heads_cache_and_products_evenly(name, tp):
    whole = load_preset(name, tp=tp, shard_only=True)
    shard = whole.on_one_device()
    assert (shard.num_heads * tp, shard.num_kv_heads * tp) == (whole.num_heads, whole.num_kv_heads)
    assert shard.kv_layout().token_bytes * tp == whole.kv_layout().token_bytes
    assert shard.weight_bytes * tp == pytest.approx(whole.weight_bytes, rel=0.01)  # norms and positions on each
    assert shard.hidden_size == whole.hidden_size


def test_shards_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"num_kv_heads=4 .* multiple of model.tp=8"):
        load_preset("yi-6b", tp=8, shard_only=True).on_one_device()
    with pytest.raises(UserError, match="shard_only=true"):
        load_preset("yi-6b", tp=2).on_one_device()
    with pytest.raises(UserError, match="checkpoint"):
        load_preset("yi-6b", tp=2, shard_only=True, checkpoint="somewhere").on_one_device()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt"}, "model.family=gpt .* is not one of: llama, opt"),
        ({"dtype": "float64"}, "model.dtype=float64 .* float32, float16, bfloat16"),
        ({"num_layers": 0}, "model.num_layers=0 .* at least 1"),
        ({"num_kv_heads": 3}, "model.num_heads=4 .* multiple of num_kv_heads=3"),
        ({"head_size": 15}, "model.head_size=15 .* even"),
        ({"rope_theta": None}, "model.rope_theta=None"),
        ({"biases": True}, "model.biases=True"),
        ({"family": "opt"}, "model.num_kv_heads=2 .* equal num_heads"),
        ({"tp": 0}, "model.tp=0 .* at least 1"),
        ({"hiden_size": 4}, "model.hiden_size: no such key.*model.hidden_size"),
        ({"num_layers": "two"}, "model.num_layers"),
    ],
)
def test_impossible_models_are_refused_by_key(changes, message):
    with pytest.raises(UserError, match=message):
        load_preset("tiny-llama", **changes)


def test_an_unknown_preset_lists_those_that_exist():
    with pytest.raises(UserError, match=r"model=yi-7b.*bench-llama.*yi-6b"):
        load_preset("yi-7b")


def test_as_a_schema_it_can_be_overridden():
    schema = OmegaConf.structured(ModelConfig)  # a frozen dataclass would be read-only here
    assert OmegaConf.merge(schema, {"num_layers": 3}).num_layers == 3


def test_configs_need_no_torch():
    code = "import sys, kvarena.harness.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
