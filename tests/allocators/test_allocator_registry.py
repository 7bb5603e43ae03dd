"""Names, options and files of conf/allocator agree."""

from dataclasses import asdict, fields

import pytest
from omegaconf import OmegaConf

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import ALLOCATORS, config_class, make_policy
from kvarena.errors import UserError
from kvarena.harness.paths import CONF

OPT_13B = attention_layout(40, 40, 128)


def from_file(name):
    node = OmegaConf.merge(OmegaConf.structured(config_class(name)), OmegaConf.load(CONF / f"allocator/{name}.yaml"))
    return OmegaConf.to_object(node)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_file_sets_every_option_and_makes_the_policy(name):
    path = CONF / f"allocator/{name}.yaml"
    assert list(OmegaConf.load(path)) == [field.name for field in fields(config_class(name))]
    assert all("#" in line for line in path.read_text().splitlines())  # each with what it means
    policy = make_policy(from_file(name), OPT_13B, 984 * 16 * OPT_13B.token_bytes, 2048)
    assert policy.name == name
    assert policy.pool_bytes == 984 * 16 * OPT_13B.token_bytes
    policy.check_integrity()


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"orca_max", "orca_pow2"}))
def test_defaults_are_those_of_the_file(name):
    assert asdict(config_class(name)()) == asdict(from_file(name))


@pytest.mark.parametrize("name", ["Paged", "vllm", ""])
def test_an_unknown_name_lists_what_exists(name):
    with pytest.raises(UserError, match=f"allocator={name}: no such allocator.*contiguous.*paged.*static"):
        config_class(name)
