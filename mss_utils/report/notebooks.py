"""Read executed notebooks, and make them small enough to commit."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat

MAX_OUTPUT = 20_000  # characters; longer outputs are removed


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook in a file; ValueError that names it where there is none in it."""
    try:
        return nbformat.read(path, as_version=4)
    except (
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        RecursionError,
        nbformat.ValidationError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{path} is no notebook ({reason}): fetch it again, or delete it if it is the copy of a run."
        ) from None


def strip_heavy_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without sounds, pictures and progress bars, and without any other output of more than `MAX_OUTPUT` characters."""
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_light(output)]
    for key in ("papermill", "widgets"):  # when, and in which folder of which machine
        notebook.metadata.pop(key, None)
    return notebook


def _is_light(output: nbformat.NotebookNode) -> bool:
    if output.get("name") == "stderr":
        return False
    text = json.dumps(output)
    pictured = any(kind.startswith("image/") or "widget" in kind for kind in output.get("data", {}))
    return len(text) <= MAX_OUTPUT and not pictured and "data:audio" not in text
