"""Read executed notebooks, and make them small enough to commit."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat

MAX_OUTPUT = 20_000  # characters; longer outputs are removed


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook; ValueError if the file is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"Cannot read notebook {path} ({reason}): restore or delete it.") from None


def strip_heavy_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove audio, images, progress bars and other long outputs from a notebook."""
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_light(output)]
    for key in ("papermill", "widgets"):  # times, and folders of this machine
        notebook.metadata.pop(key, None)
    return notebook


def _is_light(output: nbformat.NotebookNode) -> bool:
    if output.get("name") == "stderr":
        return False
    types = output.get("data", {})
    if any(kind.startswith("image/") or "widget" in kind for kind in types):
        return False
    text = json.dumps(output)
    return len(text) <= MAX_OUTPUT and "data:audio" not in text
