"""The notebooks in order by papermill, then the report: resumed where it stopped, and plain about what failed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from mss_utils import analysis, evaluation, listening
from mss_utils.config import ROOT, Run
from mss_utils.data import open_store
from mss_utils.files import atomic_write, file_lock
from mss_utils.report.notebooks import read_notebook
from mss_utils.report.typesetting import build_report
from mss_utils.separation import write_estimates

NOTEBOOKS = ROOT / "notebooks"
# What each notebook reads of the ones before it: a stage runs again when its own inputs or those of one of these change.
STAGES = {
    "01_data": (),
    "02_baseline_unet": ("01_data",),
    "03_b1_lstm": ("01_data",),
    "04_b2_attention": ("01_data",),
    "05_evaluation": ("02_baseline_unet", "03_b1_lstm", "04_b2_attention"),
    "06_listening": ("05_evaluation",),
}
# What a stage leaves behind: when one of these is gone, the stage runs again.
PRODUCTS = {
    "01_data": ("environment.json", "figures/data_levels.svg"),
    "02_baseline_unet": ("models/*/unet/seed0/model.json",),
    "03_b1_lstm": ("models/*/demucs_lstm/seed0/model.json",),
    "04_b2_attention": ("models/*/demucs_attention/seed0/model.json",),
    "05_evaluation": tuple(
        f"tables/{name}.csv" for name in (*evaluation.TABLES, *analysis.TABLES, *listening.TABLES)
    ),
    "06_listening": ("audio/*/*/*.mp3", "listening.html"),
}


class StageError(ChildProcessError):
    """A notebook failed; the message names the notebook, the cell and the error, and where the executed copy lies."""


class OwnKernel(AsyncKernelManager):
    """Runs notebooks in this very interpreter, whatever a kernel of that name is on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


def run_pipeline(run: Run) -> None:
    """Prepare the data, run every stage of `run` whose inputs have changed, one kernel each, then write the report.

    Prints one line a stage with its seconds. Of two calls for the same run the second waits for the first. Raises StageError when
    a notebook fails; what it wrote stays for reading.
    """
    with file_lock(run.folder):
        _run_stages(run)


def _run_stages(run: Run) -> None:
    started = time.perf_counter()
    print(f"{'data':<18} {_timed(open_store, run.settings):7.1f} s", flush=True)
    for name in STAGES:
        if name == "05_evaluation":
            print(
                f"{'estimates':<18} {_timed(write_estimates, run, open_store(run.settings)):7.1f} s",
                flush=True,
            )
        key = stage_key(run, name)
        if is_finished(run, name, key):
            print(f"{name:<18} unchanged, skipped", flush=True)
            continue
        seconds = _timed(_execute, run, name, key)
        print(f"{name:<18} {seconds:7.1f} s", flush=True)
    seconds = _timed(build_report, run)
    print(
        f"{'report':<18} {seconds:7.1f} s\n{'total':<18} {time.perf_counter() - started:7.1f} s -> {run.folder / 'report.pdf'}",
        flush=True,
    )


def stage_key(run: Run, name: str) -> str:
    """Hash of everything a stage reads: its notebook, the package, the run's settings, and the stages before it."""
    parts = [
        run.settings.model_dump_json(),
        (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"),
        _package_hash(),
    ]
    parts += [stage_key(run, before) for before in STAGES[name]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def is_finished(run: Run, name: str, key: str) -> bool:
    """Whether the executed copy of a stage carries `key` and everything the stage makes is still there."""
    executed = run.folder / "notebooks" / f"{name}.ipynb"
    if not executed.exists() or not all(
        any(run.folder.glob(pattern)) for pattern in PRODUCTS[name]
    ):
        return False
    try:
        return read_notebook(executed).metadata.get("mss_key") == key
    except ValueError:  # no notebook any more: somebody changed it
        return False


def _execute(run: Run, name: str, key: str) -> None:
    """Run one notebook under papermill; its executed copy, which has `key` if it has run to the end, appears when it has stopped."""
    executed = run.folder / "notebooks" / f"{name}.ipynb"
    values = dict(profile=run.settings.profile, run=run.name)
    _check_notebook(name, values)
    with atomic_write(executed) as part:  # papermill writes to it after every cell
        try:
            failure, stopped = _failure_of(name, part, values), None
        except KeyboardInterrupt as stop:
            failure, stopped = "", stop
        notebook = read_notebook(part)
        notebook.metadata.setdefault("papermill", {})["output_path"] = str(executed)
        if not (failure or stopped):
            notebook.metadata["mss_key"] = key
        part.write_text(nbformat.writes(notebook), encoding="utf-8")
    if stopped:
        raise stopped
    if failure:
        raise StageError(
            f"Notebook {name} failed{failure}\nThe executed copy is {executed}; the same command goes on from here."
        )


def _failure_of(name: str, executed: Path, values: dict) -> str:
    """Run a notebook to `executed`; in which cell it failed and why, or nothing."""
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            executed,
            values,
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            cwd=NOTEBOOKS,
            log_output=False,
            progress_bar=dict(
                desc=name, bar_format="{desc:<18} {bar:20} cell {n_fmt}/{total_fmt} {elapsed}"
            ),
        )
    except papermill.PapermillExecutionError as error:
        reason = " ".join(str(error.evalue).split())
        return f" in cell {error.cell_index + 1}.\n{error.ename}: {reason}"
    except DeadKernelError:
        return (
            ": its kernel was killed or died.\nMost often that is memory: close other programs (python -m mss_utils check tells how "
            "much there is), or set batch_size or segment_s lower in a new run."
        )
    cells = read_notebook(executed).cells
    skipped = [
        number
        for number, cell in enumerate(cells)
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None
    ]
    if skipped:
        return f": it stopped after cell {skipped[0]} of {len(cells)}.\nA cell ended the kernel's work, as sys.exit() does; let it raise an error instead."
    return ""


def _check_notebook(name: str, values: dict) -> None:
    """Raise ValueError for a notebook that is none or does not declare one of `values`, of which papermill only warns."""
    read_notebook(NOTEBOOKS / f"{name}.ipynb")
    try:
        declared = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    except ValueError as error:
        raise ValueError(
            f"Notebook {name} cannot be run ({error}): open it in Jupyter, choose a Python 3 kernel, and save it."
        ) from None
    unknown = [value for value in values if value not in declared]
    if unknown:
        raise ValueError(
            f"Notebook {name} has no parameter {unknown[0]!r}; it declares: {', '.join(declared) or 'none'}."
        )


def _package_hash() -> str:
    files = sorted(
        file for kind in ("py", "js", "css") for file in (ROOT / "mss_utils").rglob(f"*.{kind}")
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
