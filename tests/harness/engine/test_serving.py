"""One place puts policy, scheduler, store and executor together; each part is made when it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kvarena.allocators.paged.store import PagedStore
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.engine.serving import Serving

ROOT = Path(__file__).resolve().parents[3]
BUILDERS = {"make_policy", "make_scheduler", "make_store", "action_prices", "ModelledExecutor", "TorchExecutor"}
WIRING = "harness/engine/serving.py"
APART = {"harness/regression/timed_suite.py"}  # its text runs in the base's tree too, which may wire otherwise
BUILDING = {"allocators/testing", "harness/testing"}  # as tests do: parts alone


def built_in(path: Path) -> set[str]:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {name for name in (getattr(f, "attr", getattr(f, "id", "")) for f in calls) if name in BUILDERS}


def test_nobody_else_builds_them() -> None:
    builders = {}
    for package in ("allocators", "harness", "experiments", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT)
            if name.as_posix() not in APART and name.parent.as_posix() not in BUILDING and (found := built_in(path)):
                builders[name.as_posix()] = found
    assert builders == {WIRING: BUILDERS - {"TorchExecutor"}}  # which has kinds


def test_a_modelled_run_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from kvarena.experiments.command.compose import compose_run\n"
        "from kvarena.harness.engine.serving import Serving\n"
        "run = compose_run('experiment=memory_waste')\n"
        "serving = Serving(run, run.systems[0])\n"
        "assert serving.scheduler and serving.executor\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_its_memory_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[PagedStore] = []
    monkeypatch.setattr(PagedStore, "close", lambda store: closed.append(store))
    small = ("clock=measured", "device=cpu", "model=tiny-opt", "params.pool_bytes=262144", "systems=[paged]")
    run = compose_run("experiment=memory_waste", *small)
    with Serving(run, run.systems[0], context=64) as counting:
        assert counting.policy.max_tokens == 64
    assert not closed  # nobody asked for a store
    with Serving(run, run.systems[0]) as serving:
        assert serving.executor is serving.torch_executor
        assert serving.torch_executor.store is serving.store
    assert closed == [serving.store]
