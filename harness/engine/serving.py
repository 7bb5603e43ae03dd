"""What serves a run's requests with one of its systems: the one place where it is put together.

    with Serving(run, system) as serving:
        Engine(serving.scheduler, serving.executor).run(requests)

                    policy   who owns which memory
    scheduler ......^        who runs in the next step
    store .........^         the bytes, under the measured clock
    executor ...............  modelled: a step model and prices, and a virtual clock
                              measured: model, store and kernel, and the wall

Each part is made when it is first asked for: a modelled run loads no torch, and who counts builds no store. One
device's share is served: the others of a tensor-parallel group do the same, at the same time.
"""

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Self

from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.kv_pool import check_fits, kv_pool_bytes
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import Executor

if TYPE_CHECKING:  # torch is half of what the process would hold
    from kvarena.allocators.memory.store import Store
    from kvarena.harness.measured.torch_executor import TorchExecutor
    from kvarena.harness.model.contract import Model

BLOCK_TOKENS = 16  # of the blocks in which an engine's pool is counted (`kv_blocks`)


def pool_bytes_of(run: Run[object], system: System) -> int:
    """Bytes of K/V on one device: `params.pool_bytes`, else the pool that the engine's constants were fitted with,
    else what weights and activations leave of the device.

    Raises UserError where the clock is measured, and `params.pool_bytes` is not given; modelled, where the device has
    no room for it beside the weights.
    """
    given = run.pool_bytes
    if run.clock == "measured":
        if given is None:
            raise UserError("params.pool_bytes: under clock=measured a replay needs the bytes of the K/V pool")
        return given
    pool_bytes = _modelled_pool(run, system) if given is None else given
    check_fits(run.device, run.model, pool_bytes)
    return pool_bytes


def _modelled_pool(run: Run[object], system: System) -> int:
    fitted = run.engine.constants(run.model.name, system.scheduler.name)
    if fitted is not None and fitted.kv_blocks is not None:
        return int(fitted.kv_blocks * BLOCK_TOKENS * run.model.shard().kv_layout().token_bytes)
    return kv_pool_bytes(run.device, run.model) // run.model.tp


class Serving:
    """One system of a run, put together. `close`, or the end of a `with`, gives its memory back."""

    def __init__(
        self,
        run: Run[object],
        system: System,
        *,
        pool_bytes: int | None = None,
        context: int | None = None,
        model: "Model | None" = None,
        executor: "type[TorchExecutor] | None" = None,
    ) -> None:
        """`pool_bytes` of one device and `context`, the tokens of the longest sequence, are the run's where not given.

        `model`: one that several systems share, else one is built. `executor`: a kind of TorchExecutor in its place.
        """
        self.run, self.system = run, system
        self._pool_bytes, self._context = pool_bytes, context
        self._shared_model, self._executor = model, executor
        self._open = ExitStack()

    @cached_property
    def policy(self) -> Policy:
        """Raises UserError for a pool that is too small, or that the run does not state."""
        pool_bytes = pool_bytes_of(self.run, self.system) if self._pool_bytes is None else self._pool_bytes
        return make_policy(self.system.allocator, self.run.model.shard().kv_layout(), pool_bytes, self.context)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.run.context if self._context is None else self._context

    @cached_property
    def scheduler(self) -> Scheduler:
        """Raises UserError for an option out of range."""
        return make_scheduler(self.system.scheduler, self.policy, self.context)

    @cached_property
    def executor(self) -> Executor:
        """What carries steps out, by the run's clock."""
        if self.run.clock == "modelled":
            return ModelledExecutor(self.step_model, self.prices)
        return self.torch_executor

    @cached_property
    def step_model(self) -> StepModel:
        """Times of steps without the allocator's actions, of all devices together.

        Raises UserError where a device lacks a number, or the engine was fitted on something else.
        """
        run, system = self.run, self.system
        return step_model_of(run.device, run.engine, run.model, system.scheduler.name, system.attention_key)

    @cached_property
    def prices(self) -> ActionPrices:
        """Times of the allocator's actions on the modelled device."""
        return action_prices(self.run.device, self.policy)

    @cached_property
    def store(self) -> "Store":
        """The memory of the policy, on the run's device. Raises UserError where it has no room for it."""
        from kvarena.allocators.stores import make_store

        local, device = self.run.model.on_one_device(), self.run.device.kind
        store = make_store(self.policy, local.num_layers, local.num_kv_heads, local.head_size, local.dtype, device)
        self._open.callback(store.close)
        return store

    @cached_property
    def torch_executor(self) -> "TorchExecutor":
        """The executor of the measured clock."""
        from kvarena.harness.measured.torch_executor import TorchExecutor
        from kvarena.harness.model.build import build_model
        from kvarena.kernels.registry import get_kernel

        model = self._shared_model or build_model(self.run.model, self.run.device.kind)
        kernel, seed = get_kernel(self.system.kernel.name), model.config.seed
        graphs_up_to = self.context if self.run.engine.cuda_graphs else None
        return (self._executor or TorchExecutor)(model, self.store, kernel, seed, graphs_up_to)

    def close(self) -> None:
        """Give the memory back."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
