"""All stages of a run in order: notebooks by papermill, estimates, report; resumes."""

from __future__ import annotations

import hashlib
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
# The notebooks that each notebook depends on: it runs again when they or its own inputs change.
STAGES: dict[str, tuple[str, ...]] = {
    "01_data": (),
    "02_baseline_unet": ("01_data",),
    "03_b1_lstm": ("01_data",),
    "04_b2_attention": ("01_data",),
    "05_evaluation": ("02_baseline_unet", "03_b1_lstm", "04_b2_attention"),
    "06_listening": ("05_evaluation",),
}
# Results of each notebook: it runs again when one of them is missing.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "01_data": ("environment.json", "figures/data_levels.svg"),
    "02_baseline_unet": ("models/*/unet/seed0/model.json",),
    "03_b1_lstm": ("models/*/demucs_lstm/seed0/model.json",),
    "04_b2_attention": ("models/*/demucs_attention/seed0/model.json",),
    "05_evaluation": tuple(f"tables/{name}.csv" for name in TABLES),
    "06_listening": ("audio/*/*/*.mp3", "listening.html"),
}


class StageError(ChildProcessError):
    """A notebook failed; the message names the notebook, the cell and the error."""


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
    StageError
        A notebook failed; its executed copy is kept.
    """
    started = time.perf_counter()
    with file_lock(run.folder):
        _run_stage("data", lambda: open_store(run.settings))
        for name in STAGES:
            if name == "05_evaluation":  # the first notebook that reads estimates
                _run_stage("estimates", lambda: write_estimates(run, open_store(run.settings)))
            key = stage_key(run, name)
            if is_finished(run, name, key):
                print(f"{name:<18} unchanged, skipped", flush=True)
            else:
                _run_stage(name, lambda name=name, key=key: _execute(run, name, key))
        _run_stage("report", lambda: build_report(run))
    seconds = time.perf_counter() - started
    print(f"{'total':<18} {seconds:7.1f} s -> {run.folder / 'report.pdf'}", flush=True)


def _run_stage(name: str, stage: Callable[[], Any]) -> None:
    started = time.perf_counter()
    stage()
    print(f"{name:<18} {time.perf_counter() - started:7.1f} s", flush=True)


def stage_key(run: Run, name: str) -> str:
    """Return a hash of all inputs of a notebook: itself, package, settings, earlier notebooks."""
    parts = [run.settings.model_dump_json(), _package_hash()]
    parts.append((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    parts += [stage_key(run, earlier) for earlier in STAGES[name]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _package_hash() -> str:
    package, kinds = ROOT / "mss_utils", ("py", "js", "css", "html")
    files = [path for kind in kinds for path in package.rglob(f"*.{kind}")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def is_finished(run: Run, name: str, key: str) -> bool:
    """Whether the executed copy of a notebook has `key` and all its results exist."""
    if not all(any(run.folder.glob(pattern)) for pattern in PRODUCTS[name]):
        return False
    try:
        executed = read_notebook(run.folder / "notebooks" / f"{name}.ipynb")
    except (OSError, ValueError):
        return False
    return executed.metadata.get("mss_key") == key


def _execute(run: Run, name: str, key: str) -> None:
    """Run one notebook under papermill; only a complete copy gets `key`."""
    executed = run.folder / "notebooks" / f"{name}.ipynb"
    parameters = dict(profile=run.settings.profile, run=run.name)
    _check_notebook(name, parameters)
    error: StageError | KeyboardInterrupt | None = None
    with atomic_write(executed) as part:  # papermill writes to it after every cell
        try:
            _run_notebook(name, part, parameters)
        except (StageError, KeyboardInterrupt) as caught:
            error = caught
        notebook = read_notebook(part)
        if error is None:
            notebook.metadata["mss_key"] = key
        part.write_text(nbformat.writes(notebook), encoding="utf-8")
    if isinstance(error, StageError):
        raise StageError(f"{error}\nExecuted copy: {executed}. The same command resumes here.")
    if error is not None:
        raise error


def _run_notebook(name: str, executed: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook; raise StageError with the cell that failed, or stopped the kernel."""
    bar = "{desc:<18} {bar:20} cell {n_fmt}/{total_fmt} {elapsed}"
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            executed,
            parameters,
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            cwd=NOTEBOOKS,
            log_output=False,
            progress_bar=dict(desc=name, bar_format=bar),
        )
    except papermill.PapermillExecutionError as error:
        reason = " ".join(str(error.evalue).split())
        message = f"Notebook {name} failed in cell {error.cell_index + 1}.\n{error.ename}: {reason}"
        raise StageError(message) from None
    except DeadKernelError:
        raise StageError(
            f"Notebook {name} failed: its kernel died. This is usually out-of-memory:\n"
            "close other programs, or lower batch_size or segment_s in a new run."
        ) from None
    cells = read_notebook(executed).cells
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise StageError(
                f"Notebook {name} stopped after cell {number} of {len(cells)}.\n"
                "A cell ended the kernel, as sys.exit() does; raise an error instead."
            )


def _check_notebook(name: str, parameters: dict[str, Any]) -> None:
    """Raise ValueError for a file that is no notebook or lacks a parameter (papermill warns)."""
    path = NOTEBOOKS / f"{name}.ipynb"
    read_notebook(path)
    try:
        declared = papermill.inspect_notebook(path)
    except ValueError as error:
        raise ValueError(
            f"Notebook {name} cannot run ({error}): save it with a Python 3 kernel."
        ) from None
    for parameter in parameters:
        if parameter not in declared:
            raise ValueError(
                f"Notebook {name} has no parameter {parameter!r}; it declares: "
                f"{', '.join(declared) or 'none'}."
            )
