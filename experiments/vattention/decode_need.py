"""How much K/V a decoding batch writes per second (vAttention Fig 4), from a device model."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pandas as pd

from kvarena.allocators.sizes import MB
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.engine.serving import Serving
from kvarena.harness.model.presets import load_preset
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.step_model import PS_PER_S, StepLoad
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.named_systems import as_filed
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.vllm import VllmConfig

FIGURE = "fig4"
TP = {"yi-6b": 1, "llama-3-8b": 2, "yi-34b": 2}  # GPUs of each model in the paper's Table 5
PAPERS_SYSTEM = "paged-fa2"  # whose decode throughput Fig 4 shows; it depends little on the allocator


@dataclass
class Params:
    """`params.*` of conf/experiment/allocation_bandwidth.yaml; null there means: by the profile of the device."""

    page_groups: list[str] = field(default_factory=list)
    pool: str = ""  # mapped over and over
    run_groups: int = 0  # page-groups in one call, where they are mapped in runs
    rounds: int = 0  # interleaved over page-groups and ways: the samples of every interval
    need_models: list[str] = field(default_factory=list)  # of conf/model/, for Fig 4
    need_device: str = ""  # of conf/device/
    need_engine: str = ""  # of conf/engine/
    need_batches: list[int] = field(default_factory=list)
    need_context: int = 0  # tokens of every sequence


def decode_need(run: Run[Params]) -> pd.DataFrame:
    """Tokens/s of every model and batch of `params.need_*`: columns model, batch, tokens_per_s.

    Raises UserError for a model, device or engine that does not exist, is no device model, or was fitted on another.
    """
    params = run.params
    cells = [
        (name, batch, _decode_throughput(of, batch, params.need_context))
        for name, of in ((name, _modelled(run, name)) for name in params.need_models)
        for batch in params.need_batches
    ]
    return pd.DataFrame(cells, columns=["model", "batch", "tokens_per_s"])


def need_rows(run: Run[Params], need: pd.DataFrame) -> Iterator[SummaryRow]:
    """Tokens/s, and MB/s (2^20) of K/V: one token of every sequence a step, over all GPUs."""
    system = _papers_system()
    for name, cells in need.groupby("model", sort=False):
        of = _modelled(run, str(name))
        for batch, tokens_per_s in zip(cells.batch.astype(float), cells.tokens_per_s, strict=True):
            names = named(of, system, FIGURE, x=batch)
            rate = tokens_per_s * of.model.kv_layout().token_bytes / MB
            yield row(tokens_per_s, quantity="decode_throughput_vs_batch", unit="token/s", **names)
            yield row(rate, quantity="kv_allocation_rate_vs_batch", unit="MB/s", **names)


def _modelled(run: Run[Params], model: str) -> Run[Params]:
    """The run of one model that decoding is modelled by."""
    device = run.params.need_device
    hardware = typed(DeviceConfig, load("device", device), "params.need_device")
    if hardware.kind != "modelled":
        raise UserError(f"params.need_device={device}: not a device model, see conf/device/")
    engine = typed(EngineConfig, load("engine", run.params.need_engine), "params.need_engine")
    of_model = load_preset(model, tp=TP.get(model, 1))
    return replace(
        run, clock="modelled", device=hardware, engine=engine, model=of_model, reads=("model", "engine", "device")
    )


def _papers_system() -> System:
    return as_filed(PAPERS_SYSTEM, typed(VllmConfig, load("scheduler", "vllm"), "scheduler"))


def _decode_throughput(run: Run[object], batch: int, context: int) -> float:
    step = Serving(run, _papers_system()).step_model
    return batch * PS_PER_S / step.step_ps(StepLoad(batch, batch, batch * context))
