"""All stages of a run in order: notebooks by papermill, estimates, report; resumes."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from mss_utils.config import ROOT, Run
from mss_utils.data import open_store
from mss_utils.files import atomic_write, file_lock
from mss_utils.report import build_report
from mss_utils.report.tables import TABLES, read_notebook
from mss_utils.separation import write_estimates

NOTEBOOKS = ROOT / "notebooks"
SOURCES = (".py", ".js", ".css", ".html", ".mplstyle")  # that results depend on
MODEL_NOTEBOOKS = ("02_baseline_unet", "03_b1_lstm", "04_b2_attention")
# Each notebook with the notebooks that it depends on, and its results. It runs again when an input
# of it or of them has changed, or a result is missing.
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "01_data": ((), ("environment.json", "figures/data_levels.svg")),
    "02_baseline_unet": (("01_data",), ("models/*/unet/seed0/model.json",)),
    "03_b1_lstm": (
        ("01_data",),
        ("models/*/demucs_framewise/seed0/model.json", "models/*/demucs_lstm/seed0/model.json"),
    ),
    "04_b2_attention": (("01_data",), ("models/*/demucs_attention/seed0/model.json",)),
    "05_evaluation": (MODEL_NOTEBOOKS, tuple(f"tables/{name}.csv" for name in TABLES)),
    "06_listening": (("05_evaluation",), ("audio/*/*/*.mp3", "listening.html")),
}


class OwnKernel(AsyncKernelManager):
    """Run notebooks in this Python, whichever kernel is called `python3` on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return the kernel of this Python."""
        return KernelSpec(**get_kernel_dict())


def run_pipeline(run: Run) -> None:
    """Run every stage of `run` whose inputs have changed, then write the report.

    Prints one line per stage with its seconds. Of two calls for the same run the second waits.

    Raises
    ------
    ChildProcessError
        A notebook failed; the message names the cell and the error. Its executed copy is kept.
    """
    started = time.perf_counter()
    with file_lock(run.folder):
        _run_stage("data", open_store, run.settings)
        for name in STAGES:
            if name == "05_evaluation":  # the first notebook that reads estimates
                _run_stage("estimates", write_estimates, run, open_store(run.settings))
            if is_finished(run, name):
                print(f"{name:<18} unchanged, skipped", flush=True)
            else:
                _run_stage(name, _execute, run, name)
        _run_stage("report", build_report, run)
    print(f"{'total':<18} {time.perf_counter() - started:7.1f} s -> {run.folder / 'report.pdf'}")


def _run_stage(name: str, stage: Callable[..., Any], *arguments: Any) -> None:
    started = time.perf_counter()
    stage(*arguments)
    print(f"{name:<18} {time.perf_counter() - started:7.1f} s", flush=True)


def stage_key(run: Run, name: str) -> str:
    """Return a hash of all inputs of a notebook: itself, package, settings, earlier notebooks."""
    package = [path for path in (ROOT / "mss_utils").rglob("*") if path.suffix in SOURCES]
    parts = [path.read_bytes() for path in (NOTEBOOKS / f"{name}.ipynb", *sorted(package))]
    texts = [run.settings.model_dump_json(), *(stage_key(run, key) for key in STAGES[name][0])]
    parts += [text.encode() for text in texts]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]


def is_finished(run: Run, name: str) -> bool:
    """Whether the executed copy of a notebook has the key of its inputs and all results exist."""
    patterns = (f"notebooks/{name}.ipynb", *STAGES[name][1])
    if not all(any(run.folder.glob(pattern)) for pattern in patterns):
        return False
    try:
        executed = read_notebook(run.folder / "notebooks" / f"{name}.ipynb")
    except ValueError:  # damaged, as by a power failure
        return False
    return executed.metadata.get("mss_key") == stage_key(run, name)


def _execute(run: Run, name: str) -> None:
    """Run one notebook under papermill; only a complete copy gets the key of its inputs."""
    executed, key = run.folder / "notebooks" / f"{name}.ipynb", stage_key(run, name)
    parameters = dict(profile=run.settings.profile, run=run.name)
    cells = read_notebook(NOTEBOOKS / f"{name}.ipynb").cells
    declared = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    for parameter in parameters:  # papermill only warns
        if not re.search(rf"^{parameter}\b", "\n".join(declared), re.MULTILINE):
            raise ValueError(f"Notebook {name} has no cell tagged parameters with {parameter!r}.")
    with atomic_write(executed) as part:  # papermill writes to it after every cell
        try:
            notebook = _run_notebook(name, part, parameters)
        except (ChildProcessError, KeyboardInterrupt) as error:
            part.replace(executed)
            error.args = (f"{error}\nExecuted copy: {executed}. The same command resumes here.",)
            raise
        notebook.metadata["mss_key"] = key
        part.write_text(nbformat.writes(notebook), encoding="utf-8")


def _run_notebook(name: str, executed: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """Run a notebook; raise ChildProcessError with the cell that failed, or stopped the kernel."""
    try:
        notebook = papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            executed,
            parameters,
            kernel_name="python3",
            language="python",
            kernel_manager_class=OwnKernel,
            cwd=NOTEBOOKS,
            progress_bar=dict(desc=name),
        )
    except papermill.PapermillExecutionError as error:
        reason = " ".join(str(error.evalue).split())
        place = f"Notebook {name} failed in cell {error.cell_index + 1}"
        raise ChildProcessError(f"{place}.\n{error.ename}: {reason}") from None
    except DeadKernelError:
        raise ChildProcessError(
            f"Notebook {name} failed: its kernel died. This is usually out-of-memory:\n"
            "close other programs, or lower batch_size or segment_s in a new run."
        ) from None
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise ChildProcessError(f"Notebook {name} was stopped by a cell, as by sys.exit().")
    return notebook
