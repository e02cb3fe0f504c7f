"""Read the files of a finished run; exported tables may be packed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from mss_utils import analysis, evaluation, listening
from mss_utils.config import Run

TABLES = (*evaluation.TABLES, *analysis.TABLES, *listening.TABLES)


def table_path(run: Run, name: str) -> Path:
    """Return the path of a table: .csv, or .csv.gz in an export."""
    path = run.table(name)
    packed = path.with_suffix(".csv.gz")
    return packed if packed.exists() and not path.exists() else path


def read_table(run: Run, name: str) -> pd.DataFrame:
    """Read a table of a run; ValueError if it is damaged."""
    path = table_path(run, name)
    try:
        return pd.read_csv(path)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): run {run.name!r} again.") from None


def evaluated_targets(run: Run) -> list[str]:
    """Return the targets of a run in the order of its tables."""
    return read_table(run, "summary")["target"].unique().tolist()


def read_environment(run: Run) -> dict[str, Any]:
    """Read environment.json of a run."""
    return _read_json(run.folder / "environment.json")


def read_model_json(run: Run, target: str, model: str) -> dict[str, Any]:
    """Read model.json of the first seed of a model."""
    return _read_json(run.model_folder(target, model) / "model.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again.") from None


def is_study(run: Run) -> bool:
    """Whether a run was made for ablations or the amount of data: not part of the results."""
    return bool(run.settings.ablations) or run.settings.data_study


def check_finished(run: Run) -> None:
    """Raise FileNotFoundError with the first result that a run lacks."""
    for path in [run.folder / "environment.json", *(table_path(run, name) for name in TABLES)]:
        if not path.exists():
            raise FileNotFoundError(
                f"The report of run {run.name!r} needs {path}: finish the run first "
                f"(make report PROFILE={run.settings.profile} RUN={run.name})."
            )


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook; ValueError if the file is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"Cannot read notebook {path} ({reason}): restore or delete it.") from None
