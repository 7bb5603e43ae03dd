"""The README's examples are code that works: an allocator in 40 lines and a kernel in 60."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvarena.allocators import registry
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.registry import make_policy
from kvarena.allocators.stores import make_store
from kvarena.harness.config import load
from kvarena.harness.config import names as experiments
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.paths import ROOT
from kvarena.kernels.random_batch import Shapes, random_batch
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import get_kernel

README = (ROOT / "README.md").read_text()


def example(heading: str, max_lines: int) -> dict[str, Any]:
    """Names that the Python block under a heading defines."""
    section = README.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= max_lines
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def headroom() -> Iterator[Any]:
    yield example("Your own allocator, in 40 lines", 40)["HeadroomConfig"]
    registry._POLICIES.pop("headroom")


def test_the_allocator_keeps_its_books_through_a_random_program(headroom: Any) -> None:
    layout = attention_layout(2, 2, 16, "float32")
    policy = make_policy(headroom(headroom=100), layout, 5000 * layout.token_bytes, 1024)
    dice, resident = random.Random(0), {}
    for seq_id in range(300):
        seq = Sequence(seq_id, dice.randint(1, 600), dice.randint(1, 100))
        head = None if policy.admit(Admission([seq], seq.prompt_tokens)) is not None else seq
        if head is None:
            resident[seq_id] = seq
        for other in list(resident):
            if policy.length(other) == resident[other].final_tokens or dice.random() < 0.05:
                policy.release(other)
                del resident[other]
            else:
                room = resident[other].final_tokens - policy.length(other)
                assert policy.grow(other, dice.randint(1, room))
            policy.check_integrity()
            assert policy.usage(head).pool == policy.pool_bytes
    for seq_id in resident:
        policy.release(seq_id)
    usage = policy.usage()
    assert usage.free + usage.remainder == policy.pool_bytes


def test_the_allocator_yields_the_same_tokens_as_static_reservation(headroom: Any) -> None:
    from kvarena.allocators.reservation.static import StaticConfig
    from kvarena.harness.engine.engine import Engine
    from kvarena.harness.model import load_preset
    from kvarena.harness.model.build import build_model
    from kvarena.harness.requests.request import Request
    from kvarena.harness.scheduler.registry import make_scheduler
    from kvarena.harness.scheduler.vllm import VllmConfig

    config = load_preset("tiny-llama")
    model, layout = build_model(config), config.kv_layout()
    outputs = []
    for allocator in (StaticConfig(), headroom()):
        policy = make_policy(allocator, layout, 2048 * layout.token_bytes, 512)
        store = make_store(policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
        kept: dict[int, list[int]] = {}

        class Keeping(TorchExecutor):
            def finish(self, request: Request, kept: dict[int, list[int]] = kept) -> None:
                kept[request.seq_id] = list(self.tokens[request.seq_id])

        executor = Keeping(model, store, get_kernel("numba"))
        requests = [Request(i, prompt, 12) for i, prompt in enumerate((5, 70, 33, 18, 64, 2))]
        Engine(make_scheduler(VllmConfig(name="vllm"), policy, 512), executor).run(requests)
        store.close()
        outputs.append(kept)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 6


@pytest.mark.parametrize("block_size", [None, 1, 16])
@pytest.mark.parametrize("queries", [None, [1, 7, 20]])
def test_the_kernel_equals_the_reference(block_size: int | None, queries: list[int] | None) -> None:
    kernel = example("Your own kernel, in 60 lines", 60)["PlainAttention"]()
    batch = random_batch(Shapes(), [3, 40, 20], queries=queries, block_size=block_size)
    out = torch.full_like(batch.q, float("nan"))
    attend = kernel.decode if queries is None else kernel.prefill
    attend(batch.q, batch.cache, batch.view, out)
    expected = reference_attention(batch.q, batch.cache, batch.view)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_the_way_to_an_experiment_is_true() -> None:
    """Each experiment stands in the folder of its paper, and the README names it beside its figures and tables."""
    section = README.split("## Find your way", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith(("| Fig", "| Table"))]
    found: dict[str, set[str]] = {"pagedattention": set(), "vattention": set()}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for folder, figures, named in zip(found, cells[::2], cells[1::2], strict=True):
            names = re.findall(r"`(\w+)`", named)
            found[folder] |= set(names)
            stated = {key for name in names for key in load("experiment", name).get("published") or {}}
            assert {re.sub(r"[a-f]$", "", key) for key in stated} <= keys_of(figures), line
    for folder, names in found.items():
        assert all((ROOT / "experiments" / folder / f"{name}.py").is_file() for name in names)
    ours = set(experiments("experiment")) - found["pagedattention"] - found["vattention"]
    assert all((ROOT / "experiments" / "ours" / f"{name}.py").is_file() and f"`{name}`" in section for name in ours)


def keys_of(figures: str) -> set[str]:
    """fig1, fig3, table1 of `Figs 1, 3, Table 1`."""
    keys, kind = set(), ""
    for word in re.findall(r"\w+", figures):
        if word.isdigit():
            keys.add(f"{kind}{word}")
        else:
            kind = word.lower().rstrip("s")
    return keys
