"""Fit the constants of conf/engine/sarathi2024.yaml again, from the published points that it names, and print them.

    ./run.sh benchmark fit_vattention_engine

Efficiencies are geometric means: of Table 7's attention times for decode, of Table 6's at 64K tokens for prefill. The
host's six constants minimize the squared log errors of step time over Fig 8 at batch 1 and 32, both models together:

The minimum is flat: the file's values, found from other starts, lie within 2 % of what this prints.

    step = host(tp) + flashinfer + sequence x batch + max(launch(tp), device)
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from kvarena.harness.config import load, typed
from kvarena.harness.model import load_preset
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.modelled.step_model import PS_PER_S
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import read_published
from kvarena.harness.run.published import Point

MS = 1e3 / PS_PER_S
CONTEXT = 16384 + 16  # Fig 8: 16K at the start, about 33 decoded
MODELS = {"Yi-6B": load_preset("yi-6b"), "Llama-3-8B": load_preset("llama-3-8b", tp=2)}
KERNELS = {"vLLM": "vllm_paged/paged", "FA2_Paged": "fa2/paged", "FI_Paged": "flashinfer/paged",
           "FA2_vAttention": "fa2/contiguous", "FI_vAttention": "flashinfer/contiguous"}  # fmt: skip
ENGINE: EngineConfig = typed(EngineConfig, load("engine", "sarathi2024"), "engine")
A100: DeviceConfig = typed(DeviceConfig, load("device", "a100-80gb"), "device")


def published(figure: str, quantity: str) -> pd.DataFrame:
    """Points of both models."""
    table = read_published(PUBLISHED)
    return table[(table.figure == figure) & (table.quantity == quantity) & table.panel.isin(list(MODELS))]


def efficiency(points: pd.DataFrame, attention_s: Callable[[pd.Series], float]) -> pd.Series:
    """By kernel: its efficiency in the file, times modelled over published attention time, as a geometric mean."""
    ratio = [np.log(attention_s(point) / point.value) for _, point in points.iterrows()]
    return np.exp(pd.Series(ratio, index=points.system).groupby(level=0).mean())


def decode_ms(point: pd.Series) -> float:
    """Attention of a decode step as the file has it."""
    model = step_model_of(A100, ENGINE, MODELS[point.panel], "vllm", KERNELS[point.system])
    return model.context_ps * point.x * CONTEXT * MS


def prefill_s(point: pd.Series) -> float:
    """Attention of a prefill as the file has it."""
    model = step_model_of(A100, ENGINE, MODELS[point.panel], "vllm", KERNELS[point.system])
    return model.pair_ps * point.x * (point.x + 1) / 2 / PS_PER_S


def hosts() -> tuple[np.ndarray, pd.DataFrame]:
    """host (tp 1, 2), sequence, launch (tp 1, 2), flashinfer, all in ms; and the points with their errors."""
    points = published("fig8", "decode_throughput_vs_batch").copy()
    models = [step_model_of(A100, ENGINE, MODELS[p.panel], "vllm", KERNELS[p.system]) for p in points.itertuples()]
    steps_ms = 1e3 * points.x.to_numpy() / points.value.to_numpy()
    fixed = np.array([m.weights_ps + m.link_step_ps for m in models]) * MS
    device_ms = fixed + points.apply(decode_ms, axis=1).to_numpy()
    two, flashinfer = (points.panel == "Llama-3-8B").to_numpy(), (points.system == "FI_Paged").to_numpy()
    used = np.array([
        ENGINE.was_fitted_to(str(Point("vattention", "fig8", p.panel, p.system, p.x))) for p in points.itertuples()
    ])  # fmt: skip

    def log_errors(c: np.ndarray) -> np.ndarray:
        c = np.abs(c)
        host = np.where(two, c[1], c[0]) + flashinfer * c[5] + c[2] * points.x.to_numpy()
        return np.log((host + np.maximum(np.where(two, c[4], c[3]), device_ms)) / steps_ms)

    best = min(
        (minimize(lambda c: float((log_errors(c)[used] ** 2).sum()), start, method="Nelder-Mead",
                  options={"maxiter": 20000, "maxfev": 20000, "xatol": 1e-6, "fatol": 1e-12})
         for start in ([5, 5, 0.1, 7, 13, 1], [8, 8, 0.05, 7, 13, 1], [4, 6, 0.14, 9, 16, 1.2])),
        key=lambda found: found.fun,
    )  # fmt: skip
    return np.abs(best.x), points.assign(error=np.expm1(log_errors(best.x)), fitted=used)


if __name__ == "__main__":
    print(
        "read_efficiency x",
        efficiency(published("table7", "decode_attention_time_vs_batch"), decode_ms).round(3).to_dict(),
    )
    table6 = published("table6", "prefill_attention_time_vs_context")
    print("flop_efficiency x", efficiency(table6[table6.x == 65536], prefill_s).round(3).to_dict())
    constants, points = hosts()
    names = ("host tp=1", "host tp=2", "sequence", "launch tp=1", "launch tp=2", "flashinfer")
    print({name: round(float(value), 3) for name, value in zip(names, constants, strict=True)}, "ms")
    for fitted, rows in points.groupby("fitted"):
        off = rows.error.abs()
        print(
            "fitted" if fitted else "others", f"{len(off)} points, median {off.median():.1%}, largest {off.max():.1%}"
        )
