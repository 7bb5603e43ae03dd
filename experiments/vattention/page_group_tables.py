"""Tokens in a page-group (vAttention Tables 8 and 10): arithmetic on the models' shapes, with the policy's geometry."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kvarena.allocators.sizes import MB, format_bytes
from kvarena.allocators.vattention.page_groups import PAGE_GROUPS, row_geometries
from kvarena.harness.model import load_preset
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run

MODELS = ("yi-6b", "llama-3-8b", "yi-34b")
DEGREES = (1, 2)  # of tensor parallelism
QUANTITY = {"quantity": "tokens_per_page_group", "unit": "tokens"}


def token_rows(run: Run[object], models: Sequence[str] = MODELS) -> Iterator[SummaryRow]:
    """Whole tokens in one page-group of one tensor: every size plain, the largest also sliced (section 8.2)."""
    for name in models:
        for tp in DEGREES:
            alone = replace(run, model=load_preset(name, tp=tp), reads=("model",))  # nobody serves it anything
            layout = alone.model.shard().kv_layout()
            for size in PAGE_GROUPS:
                key = format_bytes(size)
                [plain] = row_geometries(layout, size, tensor_slicing=False)
                yield row(size // plain.token_stride, **QUANTITY, **named(alone, None, "table8", key=key, counted=True))
            for sliced in (False, True):
                key = f"2MB {'sliced' if sliced else 'unsliced'}"
                [geometry] = row_geometries(layout, 2 * MB, tensor_slicing=sliced)
                tokens = 2 * MB // geometry.token_stride
                yield row(tokens, **QUANTITY, **named(alone, None, "table10", key=key, counted=True))
