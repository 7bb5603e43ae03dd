"""What the paged policy's bookkeeping costs, per block: allocate 32 blocks and free them, reference counts included.

Prints CPU time of the thread, variants interleaved in one process, medians with 95 % intervals over rounds.
`counting to one` is the block pool with a counter for every block instead of one for shared blocks only: what it costs
is why it is not done.
"""

import argparse
from collections.abc import Callable
from time import thread_time_ns

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission, Sequence
from kvarena.harness.record.statistics import median_interval

TARGET_NS = 100.0
BLOCKS, BLOCK_SIZE = 32, 16
OPT_13B = attention_layout(num_layers=40, num_kv_heads=40, head_size=128)
POOL_BLOCKS = 984  # PagedAttention Fig 2


class CountingPool:
    """A free list and one counter per block."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks))
        self.references = [0] * num_blocks

    def take(self, count: int) -> list[int]:
        """Pop blocks and count them to one."""
        taken = [self.free.pop() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def drop(self, blocks: list[int]) -> None:
        """Count blocks down, and push those that reach zero."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                self.free.append(block)


def busy_policy() -> PagedPolicy:
    """A policy with half its blocks given to others."""
    policy = PagedPolicy(PagedConfig(), OPT_13B, POOL_BLOCKS * BLOCK_SIZE * OPT_13B.token_bytes, max_tokens=2048)
    for seq_id in range(16):
        policy.admit(Admission([Sequence(seq_id, 480, 64)], 480))
    return policy


def variants() -> dict[str, tuple[int, Callable[[], None]]]:
    """Name -> blocks that one call allocates and frees, the call."""
    policy, shared = busy_policy(), busy_policy()
    pool, counting = BlockPool(POOL_BLOCKS), CountingPool(POOL_BLOCKS)
    seq, tokens = Sequence(100, BLOCKS * BLOCK_SIZE, 16), BLOCKS * BLOCK_SIZE
    child = Sequence(101, tokens, 16)

    def at_once() -> None:
        policy.admit(Admission([seq], tokens))
        policy.release(100)

    def one_by_one() -> None:
        policy.admit(Admission([seq], BLOCK_SIZE))
        for _ in range(BLOCKS - 1):
            policy.grow(100, BLOCK_SIZE)
        policy.release(100)

    def forked() -> None:
        shared.admit(Admission([seq], tokens))
        shared.sharing.fork(100, child)
        shared.release(100)
        shared.release(101)

    return {
        "policy, admit and release": (BLOCKS, at_once),
        "policy, block by block": (BLOCKS, one_by_one),
        "policy, with a fork": (2 * BLOCKS, forked),
        "pool alone": (BLOCKS, lambda: void(pool.drop(pool.take(BLOCKS)))),
        "pool alone, counting to one": (BLOCKS, lambda: counting.drop(counting.take(BLOCKS))),
    }


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    """Print a table, and whether the target holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=2000, help="calls per round and variant")
    args = parser.parse_args()
    cases = variants()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (blocks, call) in cases.items():
            start = thread_time_ns()
            for _ in range(args.calls):
                call()
            samples[name].append((thread_time_ns() - start) / (args.calls * blocks))
    medians = {name: median_interval(values) for name, values in samples.items()}
    print(f"{'variant':30} {'ns per block':>12}   95 % interval")
    for name, estimate in medians.items():
        print(f"{name:30} {estimate.median:12.1f}   {estimate.ci_low:.1f} .. {estimate.ci_high:.1f}")
    median = medians["policy, admit and release"].median
    print(f"target of {TARGET_NS:.0f} ns over measured: {TARGET_NS / median:.1f} (1 or more: reached)")


if __name__ == "__main__":
    main()
