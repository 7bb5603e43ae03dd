"""Every experiment as small as it runs, under each clock that it has: what the tests of all keys and systems start from."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from kvarena.experiments import registry
from kvarena.harness.config import GROUPS, check_overrides, load
from kvarena.harness.paths import CONF
from kvarena.harness.record import Frames, Recorder
from kvarena.harness.run import Run
from kvarena.harness.schemas import schema_of

# (experiment, clock) -> overrides of its defaults
TINY: dict[tuple[str, str], tuple[str, ...]] = {
    ("memory_waste", "modelled"): (
        "systems=[orca-max,paged,vattention-64kb]", "arrival.rate=60", "arrival.duration_s=1", "params.window_s=[0,8]",
        "params.seeds=[0]",
    ),
    ("memory_waste", "measured"): ("systems=[paged]", "device=cpu", "arrival.duration_s=0.01", "trace.max_tokens=64"),
}  # fmt: skip
_COMPOSED = (*GROUPS[:6], "engine", "device")  # groups of which another choice must be composed; others are read by name


class Unwritten(Recorder):
    """Measures every cell and writes none."""

    def __init__(self) -> None:
        pass

    def cell(self, key: str, measure: Any) -> Frames:
        """The frames, as a run that was continued would read them back."""
        return measure()

    def has_cell(self, key: str) -> bool:
        """Nothing is left of other runs."""
        return False


def resolved(experiment: str, clock: str, *overrides: str) -> Run:
    """The tiny run with more overrides. Raises UserError like the command line."""
    arguments = [f"experiment={experiment}", f"clock={clock}", *TINY[experiment, clock], *overrides]
    check_overrides(arguments, schema_of(arguments, registry.params_schema))
    chosen = tuple(o for o in arguments if "." not in o.partition("=")[0] and o.partition("=")[0] in _COMPOSED)
    config = deepcopy(_composed(chosen))
    with open_dict(config):
        for key, value in _values(o for o in arguments if o not in chosen):
            if key in GROUPS:  # scheduler, allocator, kernel
                config[key] = load(key, value)
            else:
                OmegaConf.update(config, key, value, force_add=True)
        _state_as_tiny(config, TINY[experiment, clock])
    return registry.resolved(config, arguments)


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def _state_as_tiny(config: DictConfig, overrides: tuple[str, ...]) -> None:
    """Let the published points have run with the tiny values: whatever else differs must still un-earn their names."""
    for figure in (config.get("published") or {}).values():
        ran, panels = figure.get("ran") or {}, (figure.get("panels") or {}).values()
        for key, value in _values(overrides):
            group, _, name = key.partition(".")
            for stated in (ran, *(panel for panel in panels if panel)):
                if group == "trace" and "trace" in stated:
                    OmegaConf.update(stated, f"trace_keys.{name}", value, force_add=True)
                elif name in (stated.get(group) or {} if name else {}):
                    stated[group][name] = value


def _values(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for override in overrides:
        key, _, value = override.partition("=")
        yield key, OmegaConf.from_dotlist([f"value={value}"]).value


def default_systems(experiment: str, clock: str) -> list[str]:
    """The systems that the experiment compares by default, whatever the tiny run does."""
    config = load("experiment", experiment)
    kind = "modelled" if clock == "modelled" else "cpu"
    return list(config.get("systems") or (config.profiles.get(kind) or {}).get("systems") or [])
