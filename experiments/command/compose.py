"""Runs composed in code: what the command line composes, for tests, benchmarks and notebooks."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra import compose, initialize_config_dir

from kvarena.experiments.command import paths, registry
from kvarena.harness.config import check_overrides, on_auto, tell_hydra
from kvarena.harness.paths import CONF
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import schema_of


@contextmanager
def configuration() -> Iterator[None]:
    """Inside, Hydra's `compose` finds conf/, and allocators and kernels beside it."""
    tell_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose_run(*overrides: str) -> Run[object]:
    """The run that `./run.sh <overrides>` would be. Raises UserError like the command line."""
    arguments = paths.quoted(overrides)
    registry.named(arguments)
    check_overrides(arguments, schema_of(arguments, registry.params_schema))
    with configuration():
        opened = on_auto(arguments)
        paths.parsed(opened)
        config = compose("config", opened)
    return registry.resolved(config, arguments)
