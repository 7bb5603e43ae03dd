"""Every module of an experiment offers what the command line asks of it, for runs of its own parameters."""

from inspect import isfunction
from typing import get_type_hints

import pytest

from kvarena.experiments.command import registry
from kvarena.harness.config import names
from kvarena.harness.run.run import Run


@pytest.mark.parametrize("name", names("experiment"))
def test_it_takes_runs_of_its_own_params(name):
    module = registry.get(name)
    for offered in filter(isfunction, (module.unread, module.measure, module.summarize)):
        assert get_type_hints(offered)["run"] in (Run[module.Params], Run[object]), offered
