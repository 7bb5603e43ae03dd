"""Names of allocators, their options, and what the one place that states these says of each."""

import inspect
from dataclasses import dataclass, fields

import pytest

from kvarena.allocators import registry
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import allocator, allocator_names, config_class, make_policy, preset
from kvarena.allocators.reservation.static import StaticPolicy
from kvarena.errors import UserError
from kvarena.harness.config import load, typed

OPT_13B = attention_layout(40, 40, 128)


@pytest.mark.parametrize("name", allocator_names())
def test_its_options_are_told_in_one_place_and_make_the_policy(name):
    schema = config_class(name)
    lines = {line.split(":")[0].strip(): line for line in inspect.getsource(schema).splitlines()}
    assert all("  # " in lines[field.name] for field in fields(schema) if field.name != "name")
    config = typed(schema, load("allocator", name), "allocator")
    assert config == preset(name)
    assert {field.name for field in fields(schema)} == set(load("allocator", name))  # else Hydra refuses overrides
    policy = make_policy(config, OPT_13B, 984 * 16 * OPT_13B.token_bytes, 2048)
    assert policy.name == name
    assert policy.pool_bytes == 984 * 16 * OPT_13B.token_bytes
    policy.check_integrity()


@pytest.mark.parametrize("name", ["Paged", "vllm", ""])
def test_an_unknown_name_lists_what_exists(name):
    with pytest.raises(UserError, match=f"allocator={name}: no such allocator.*contiguous.*paged.*static"):
        config_class(name)


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))

    @dataclass
    class Mine:
        name: str = "mine"

    @allocator(Mine())
    class MinePolicy(StaticPolicy):
        name = "mine"

    assert "mine" in allocator_names()
    assert allocator(Mine())(MinePolicy) is MinePolicy  # a notebook's cell that is run again
    with pytest.raises(UserError, match="allocator mine: there is one of that name"):
        allocator(Mine())(StaticPolicy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("class MinePolicy(", "class MinePolicy(("), r"\.py:12: .*syntax"),
        (("import Layout", "import Layuot"), r"\.py:\d+: ImportError: .*Layuot"),
        (("@dataclass", ""), r"\.py:\d+: .*dataclass"),
        (("Config())", "Config)"), r"\.py:\d+: .*dataclass"),
        (('"mine"', '"static"'), "allocator static: .*StaticPolicy.*MinePolicy"),
        (("memory_layout =", "layout ="), r"memory_layout.*Layout\.CONTIGUOUS"),
        (("def _bound", "def _bond"), "lacks _bound"),
        (("(ReservingPolicy[int])", ""), "no subclass of Policy"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, monkeypatch, change, said):
    """Not with a traceback: the file is the user's."""
    text = inspect.cleandoc(
        """
        from dataclasses import dataclass
        from kvarena.allocators.registry import allocator
        from kvarena.allocators.reservation.policy import ReservingPolicy
        from kvarena.kernels.layout import Layout

        @dataclass
        class MineConfig:
            name: str = "mine"


        @allocator(MineConfig())
        class MinePolicy(ReservingPolicy[int]):
            memory_layout = Layout.CONTIGUOUS

            def _bound(self, seq):
                return 1
        """
    )
    assert change[0] in text
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    file = tmp_path / "mine.py"
    file.write_text(text.replace(*change))
    with pytest.raises(UserError, match=said):
        registry.imported(file, lambda: exec(compile(file.read_text(), str(file), "exec"), {"__name__": "mine"}))
