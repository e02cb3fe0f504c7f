"""The committed notebooks: no outputs, documented parameters, readable cells."""

import ast

import nbformat
import papermill
import pytest

from mss_utils.pipeline import NOTEBOOKS, STAGES

PATHS = [NOTEBOOKS / f"{name}.ipynb" for name in STAGES]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_the_notebooks_of_the_pipeline_and_no_others():
    assert sorted(NOTEBOOKS.glob("*.ipynb")) == sorted(PATHS)


@by_name
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert not {"papermill", "widgets"} & set(notebook.metadata)


@by_name
def test_parameters_are_literals_with_types_and_help(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.metadata.tags == ["parameters"]
    for statement in ast.parse(first.source).body:
        assert isinstance(statement, ast.AnnAssign)
        ast.literal_eval(statement.value)
    documented = papermill.inspect_notebook(path)
    more = {"answers"} if path.stem == "06_listening" else set()
    assert set(documented) == {"profile", "run", "data", "target", "overrides"} | more
    assert all(
        entry["help"] and entry["inferred_type_name"] == "str" for entry in documented.values()
    )


@by_name
def test_cells_are_short_and_prose_keeps_up_with_code(path):
    cells = nbformat.read(path, as_version=4).cells
    lengths = sorted(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")
    assert lengths[-1] <= 15 and lengths[len(lengths) // 2] <= 7
    n_code = len(lengths) - 3  # parameters, set-up and imports speak for themselves
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 0.8 * n_code
