"""The committed notebooks: no outputs, documented parameters, short cells."""

import ast

import nbformat
import papermill
import pytest

from mss_utils.pipeline import NOTEBOOKS, STAGES

PATHS = [NOTEBOOKS / f"{name}.ipynb" for name in STAGES]


def test_notebooks_are_those_of_the_pipeline():
    assert sorted(NOTEBOOKS.glob("*.ipynb")) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_clean_documented_and_short(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert not {"papermill", "widgets"} & set(notebook.metadata)
    assert code[0].metadata.tags == ["parameters"]
    for statement in ast.parse(code[0].source).body:
        assert isinstance(statement, ast.AnnAssign)
        ast.literal_eval(statement.value)
    parameters = papermill.inspect_notebook(path)
    assert {"profile", "run", "data", "target", "overrides"} <= set(parameters)
    assert all(parameter["help"] for parameter in parameters.values())
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    assert lengths[-1] <= 20 and lengths[len(lengths) // 2] <= 7
    n_prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert n_prose >= 0.8 * (len(lengths) - 3)  # parameters, set-up and imports need none
