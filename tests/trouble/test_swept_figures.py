"""Whatever a sweep varies, its figure can be drawn: rows of two jobs differ in their labels alone."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from omegaconf import OmegaConf

from kvarena.experiments.command import registry, sweep
from kvarena.harness.paths import RESULTS

KEPT = {path.parent.name: path for path in sorted(RESULTS.glob("*/*/summary.csv"))}  # one of each name


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_sweep_of_any_experiment_is_drawn(kept: Path) -> None:
    experiment = OmegaConf.load(kept.with_name("config.yaml")).experiment
    one = pd.read_csv(kept)
    both = pd.concat([sweep._labelled(one, f"params.k={k}") for k in (1, 2)], ignore_index=True)
    figure = registry.get(experiment).draw(sweep._once(both))
    assert figure.axes
    plt.close(figure)
