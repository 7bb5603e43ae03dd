"""Tokens in a page-group (vAttention Tables 8 and 10): arithmetic on the models' shapes, with the policy's geometry."""

from collections.abc import Iterator, Sequence
from typing import Any

from kvarena.allocators.page_groups import PAGE_GROUPS, row_geometries
from kvarena.allocators.sizes import MB, format_bytes
from kvarena.harness.model import load_preset, panel_name
from kvarena.harness.summary import SummaryRow, row

DEGREES = (1, 2)  # of tensor parallelism


def token_rows(models: Sequence[str], **shared: Any) -> Iterator[SummaryRow]:
    """Whole tokens in one page-group of one tensor: every size plain, the largest also sliced (section 8.2)."""
    for name in models:
        for tp in DEGREES:
            model = load_preset(name, tp=tp)
            columns = {
                **shared, "paper": "vattention", "panel": f"{panel_name(model)} TP-{tp}", "model": name, "kernel": "-",
                "allocator": "vattention", "quantity": "tokens_per_page_group", "unit": "tokens", "evidence": "exact",
            }  # fmt: skip
            layout = model.shard().kv_layout()
            for size in PAGE_GROUPS:
                [plain] = row_geometries(layout, size, tensor_slicing=False)
                yield row(size // plain.token_stride, figure="table8", system=format_bytes(size), **columns)
            for sliced, label in ((False, "unsliced"), (True, "sliced")):
                [geometry] = row_geometries(layout, 2 * MB, tensor_slicing=sliced)
                yield row(2 * MB // geometry.token_stride, figure="table10", system=f"2MB {label}", **columns)
