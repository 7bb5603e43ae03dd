"""A key that nothing reads in a run is refused by its name, in every experiment: the last one of each line."""

import re

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run

MODELLED, CPU = "clock=modelled", "device=cpu"
UNREAD = {
    "attention_kernel": [
        f"{CPU} model=tiny-llama {key}" for key in (
            "systems=[paged]", "arrival.rate=3", "trace=alpaca", "engine=lean", "decoding=beam", "model.num_layers=2",
            "model.tp=2", "model.hidden_size=64", "params.kernels=[sdpa] params.block_sizes=[1,16]",
        )
    ],
    "batched_requests": [
        f"{MODELLED} {key}" for key in (
            "arrival.duration_s=60", "arrival.seed=3", "trace=alpaca", "+params.paths.wmt=x.csv",
        )
    ],
    "beam_search": [
        f"{MODELLED} {key}" for key in (
            "allocator=vattention allocator.max_rows=64", "systems=[orca-max] params.band=[paged]",
        )
    ],
    "block_size": [
        "arrival.rate=3", "allocator=paged allocator.block_size=32", "params.rounds=3",
        "params.rates={sharegpt:2} params.paths.alpaca=x",
    ],
    "block_size_kernel": [
        f"{CPU} model=tiny-llama {key}" for key in (
            "systems=[paged]", "arrival.rate=3", "model.ffn_size=8", "engine.cuda_graphs=true",
        )
    ],
    "calibrate": [f"{CPU} systems=[paged] engine.kv_efficiency=0.5"],
    "chatbot": [f"{MODELLED} trace.new_conversation=0.3"],
    "memory_layout": ["params.pool_bytes=1000000000", "arrival=poisson"],
    "parallel_sampling": [
        f"{MODELLED} {key}" for key in (
            "decoding=beam", "trace.mix={n2:1.0}", "arrival.rate=3", "params.rates=[3] params.stride=2",
        )
    ],
    "preemption": ["allocator=paged allocator.swap_bytes=1GB", "scheduler.preemption=swap", "params.rounds=3"],
    "serving_latency": [
        f"{MODELLED} {key}" for key in (
            "model=llama-3-8b", "engine=lean device=h200", "trace.seed=1", "arrival.rate=2", "trace=alpaca",
            "params.only=[fig12d] trace.filter=none", "params.only=[fig12d] params.paths.sharegpt=x.csv",
            "allocator=fastertransformer allocator.batch_size=9",
            "params.only=[fig12a] params.crossing=[] params.tolerance=0.1",
            "systems=[vattention-2mb] params.crossing=[paged]",
        )
    ],
    "shared_prefix": [f"{MODELLED} trace=wmt16_5shot", f"{MODELLED} params.only=[fig16b] trace.filter=fits_context"],
    "sharing_savings": [f"{MODELLED} systems=[paged] params.max_rows=9", f"{MODELLED} decoding=parallel"],
    "allocation_bandwidth": ["engine=lean", "model=yi-6b", "systems=[paged]"],
    "vmm_api_latency": ["arrival.rate=3", "model=yi-6b"],
}  # fmt: skip


@pytest.mark.parametrize(("experiment", "line"), [(name, line) for name, lines in UNREAD.items() for line in lines])
def test_a_key_that_nothing_reads_is_refused_by_its_name(experiment: str, line: str) -> None:
    overrides = line.split()
    key = overrides[-1].lstrip("+").partition("=")[0]
    with pytest.raises(UserError, match=f"^{re.escape(key)}: nothing reads it"):
        compose_run(f"experiment={experiment}", *overrides)
