"""What the stores of reserved and of paged memory share: the whole pool, resident from the start.

On a GPU a reserved pool is taken when the server starts. On a host, memory that nobody has touched is not there yet,
so that "reserve the maximum" would quietly be on-demand paging: one page-group of the pool's size is created (and so
faulted in) and mapped, page tables included, before the first request.
"""

from collections.abc import Sequence

import torch

from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.store import DriverCalls, Physical, Store
from kvarena.allocators.policy import Action, Policy
from kvarena.allocators.sizes import round_up
from kvarena.allocators.vmm.driver import Driver
from kvarena.allocators.vmm.drivers import granularity_of, make_driver_of_one


class ResidentStore(Store):
    """One pool, mapped whole, and never again changed."""

    def __init__(
        self, policy: Policy, shape: ModelShape, addressed_bytes: int, device: torch.device | str = "cpu"
    ) -> None:
        """Maps the policy's pool at `self.base`; `addressed_bytes` from there on may be spanned by tensors."""
        shape.check(policy.kv_layout)
        pool_bytes = round_up(policy.pool_bytes, granularity_of(device))
        self.driver: Driver = make_driver_of_one(device, pool_bytes)
        try:
            self.base = self.driver.reserve(max(pool_bytes, addressed_bytes))
            pool = self.driver.create(1)
            if not self.driver.new_memory_is_zero:  # kernels weigh what lies past a length with 0: no NaN may be there
                self.driver.clear(pool)
            self.driver.map(self.base, 0, pool)
        except BaseException:
            self.driver.close()
            raise

    def apply_in_background(self, actions: Sequence[Action]) -> None:
        """Nothing to do in the background."""
        self.apply(actions)

    def physical(self) -> Physical:
        """The pool, rounded up to the system's pages: all of it is mapped."""
        return Physical(self.driver.mapped_bytes, self.driver.pooled_bytes, self.driver.counted_bytes())

    def driver_calls(self) -> DriverCalls:
        """None since the start."""
        return DriverCalls(0, 0.0, 0, 0.0, 0.0)

    def close(self) -> None:
        """Give the pool back."""
        self.driver.close()
