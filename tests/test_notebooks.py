"""Notebooks run from what is committed, without a GPU and without measuring, and their outputs are in git."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kvarena.harness.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_it_executes(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_in_git_and_free_of_machine_paths(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "execute it before it is committed"
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs), "no figure in it"
    assert str(ROOT) not in path.read_text()
