"""10,000 random programs of groups that fork, grow, die, are swapped and end, on real memory, checked after each step.

    python benchmarks/sharing_programs.py [--programs 10000] [--seed 0]

Programs are shared out among allocators (`kvarena/allocators/sharing_programs.py` says what is checked). Prints, for
each, what was exercised. Then a fault is planted - blocks given back twice - and must be found. Exits with 1 if a
program fails, or the fault is not found.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from kvarena.allocators.actions import Action
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.sizes import KB
from kvarena.allocators.stores import make_store
from kvarena.allocators.testing.sharing_programs import Programs

LAYERS, HEADS, SIZE, MAX_TOKENS = 2, 4, 64, 128
LENGTH = 25  # operations of a program
ALLOCATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "paged, blocks of 4": ("paged", {"block_size": 4, "swap_bytes": 256 * KB}),
    "paged, blocks of 16": ("paged", {"block_size": 16, "swap_bytes": 512 * KB}),
    "vattention 64 KB": ("vattention", {"page_group": "64KB", "max_rows": 9}),
    "vattention 64 KB, sliced": ("vattention", {"page_group": "64KB", "max_rows": 9, "tensor_slicing": True}),
    "vattention 64 KB, sliced, bare": (
        "vattention",
        {
            "page_group": "64KB",
            "max_rows": 9,
            "tensor_slicing": True,
            "overlap": False,
            "deferred_reclamation": False,
            "eager_allocation": False,
        },
    ),
    "orca_oracle": ("orca_oracle", {}),
    "paged_reserved": ("paged_reserved", {}),
    "static": ("static", {}),
}


def programs_of(name: str, options: dict[str, Any]) -> tuple[Programs, Counter[str]]:
    """Programs for an allocator over a pool too small for them, and a count of the actions that its store performs."""
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    policy = make_policy(config_class(name)(name=name, **options), layout, 1200 * KB, MAX_TOKENS)
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32")
    performed: Counter[str] = Counter()
    apply = store.apply

    def counted(actions: Sequence[Action]) -> None:
        performed.update(type(action).__name__ for action in actions)
        apply(actions)

    store.apply = counted  # type: ignore[method-assign]
    return Programs(policy, store, LAYERS), performed


def run(name: str, options: dict[str, Any], count: int, seed: int) -> Counter[str]:
    """Play so many programs. Returns the actions that they took."""
    programs, performed = programs_of(name, options)
    chance = random.Random(seed)
    for _ in range(count):
        programs.play(chance.randrange, LENGTH)
    programs.store.close()
    return performed


def planted_fault_is_found(seed: int) -> bool:
    """Give every block of a table that ends back, whether others hold it or not."""
    right = BlockPool.drop

    def drop_all(pool: BlockPool, blocks: list[int]) -> list[int]:
        right(pool, blocks)
        pool.give([block for block in blocks if block in pool._extra])
        return blocks

    BlockPool.drop = drop_all  # type: ignore[method-assign]
    try:
        run("paged", {"block_size": 4}, 20, seed)
    except (IntegrityError, AssertionError) as error:
        print(f"planted double free found: {error}"[:110])
        return True
    finally:
        BlockPool.drop = right  # type: ignore[method-assign]
    return False


def main() -> None:
    """Print what was exercised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    each = -(-arguments.programs // len(ALLOCATORS))
    for label, (name, options) in ALLOCATORS.items():
        performed = run(name, options, each, arguments.seed)
        shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(performed.items()))
        print(f"{label:32} {each:,} programs of {LENGTH} operations: none failed; {shown}")
    if not planted_fault_is_found(arguments.seed):
        sys.exit("a planted double free was not found")


if __name__ == "__main__":
    main()
