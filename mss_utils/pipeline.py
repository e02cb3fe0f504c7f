"""The notebooks in order by papermill, then the report: resumed where it stopped, and plain about what failed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import torch
import typst

from mss_utils import analysis, evaluation, listening
from mss_utils.data import Store, open_store
from mss_utils.settings import ROOT, Run, replacing, write_text

NOTEBOOKS = ROOT / "notebooks"
REPORT = ROOT / "report"
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
    "05_evaluation": tuple(f"tables/{name}.csv" for name in (*evaluation.TABLES, *analysis.TABLES, *listening.TABLES)),
    "06_listening": ("audio/*/*/*.mp3", "listening.html"),
}
PACKAGES = ("torch", "torchaudio", "numpy", "musdb", "museval", "lightning-fabric", "papermill")


class StageError(ChildProcessError):
    """A notebook failed; the message names the notebook, the cell and the error, and where the executed copy lies."""


def run_pipeline(run: Run) -> None:
    """Prepare the data, run every stage of `run` whose inputs have changed, one kernel each, then write the report.

    Prints one line a stage with its seconds. Raises StageError when a notebook fails; what it wrote stays for reading.
    """
    started = time.perf_counter()
    print(f"{'data':<18} {_timed(open_store, run.settings):7.1f} s", flush=True)
    for name in STAGES:
        key = stage_key(run, name)
        if is_finished(run, name, key):
            print(f"{name:<18} unchanged, skipped", flush=True)
            continue
        seconds = _timed(_execute, run, name, key)
        print(f"{name:<18} {seconds:7.1f} s", flush=True)
    seconds = _timed(build_report, run)
    print(f"{'report':<18} {seconds:7.1f} s\n{'total':<18} {time.perf_counter() - started:7.1f} s -> {run.folder / 'report.pdf'}", flush=True)


def stage_key(run: Run, name: str) -> str:
    """Hash of everything a stage reads: its notebook, the package, the run's settings, and the stages before it."""
    parts = [run.settings.model_dump_json(), (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"), _package_hash()]
    parts += [stage_key(run, before) for before in STAGES[name]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def is_finished(run: Run, name: str, key: str) -> bool:
    """Whether the executed copy of a stage carries `key` and everything the stage makes is still there."""
    executed = run.folder / "notebooks" / f"{name}.ipynb"
    if not executed.exists() or not all(any(run.folder.glob(pattern)) for pattern in PRODUCTS[name]):
        return False
    return nbformat.read(executed, as_version=4).metadata.get("mss_key") == key


def _execute(run: Run, name: str, key: str) -> None:
    """Run one notebook under papermill; its executed copy gets `key` once it has run to the end."""
    executed = run.folder / "notebooks" / f"{name}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    values = dict(profile=run.settings.profile, run=run.name)
    _check_parameters(name, values)
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb", executed, values, kernel_name=_kernel_name(), cwd=NOTEBOOKS, log_output=False,
            progress_bar=dict(desc=name, bar_format="{desc:<18} {bar:20} cell {n_fmt}/{total_fmt} {elapsed}"),
        )
    except papermill.PapermillExecutionError as error:
        raise StageError(
            f"Notebook {name} failed in cell {error.cell_index + 1}.\n{error.ename}: {error.evalue}\n"
            f"The executed copy is {executed}; the same command goes on from here."
        ) from None
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["mss_key"] = key
    write_text(executed, nbformat.writes(notebook))


def _check_parameters(name: str, values: dict) -> None:
    """papermill only warns about a parameter that a notebook does not declare; here it is an error."""
    declared = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    unknown = [value for value in values if value not in declared]
    if unknown:
        raise ValueError(f"Notebook {name} has no parameter {unknown[0]!r}; it declares: {', '.join(declared) or 'none'}.")


def _kernel_name() -> str:
    """The kernel that the notebooks ask for, unless this interpreter's environment has none: then say so."""
    from jupyter_client.kernelspec import KernelSpecManager

    specs = KernelSpecManager().find_kernel_specs()
    if "python3" not in specs:
        raise FileNotFoundError(f"No Jupyter kernel 'python3' (found: {', '.join(specs) or 'none'}); install it with: pip install ipykernel")
    return "python3"


def _package_hash() -> str:
    files = sorted(file for kind in ("py", "js", "css") for file in (ROOT / "mss_utils").rglob(f"*.{kind}"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def build_report(run: Run) -> Path:
    """Compile `report/report.typ` over the files of `run` to `results/<run>/report.pdf` and return its path.

    Typst reads only below one root: sources and results are linked or copied side by side in a temporary folder.
    Raises FileNotFoundError naming what is missing when the run has not been evaluated.
    """
    for needed in ("settings.json", *(product for products in PRODUCTS.values() for product in products)):
        if not any(run.folder.glob(needed)):
            raise FileNotFoundError(f"The report of run {run.name!r} needs {run.folder / needed}: finish the run first (make report RUN={run.name}).")
    listening.ratings_of(run)  # answers may have come in since the notebooks ran
    pdf = run.folder / "report.pdf"
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(REPORT, Path(root) / "report", ignore=shutil.ignore_patterns("*.pdf"))
        shutil.copytree(run.folder, Path(root) / "run", ignore=shutil.ignore_patterns("*.ckpt", "*.safetensors", "*.mp3", "*.ipynb", "*.pdf", "*.html", "songs", "answers"))
        run_settings = run.settings.model_dump_json(indent=2)  # a run of an older version has not all of them
        write_text(Path(root) / "run" / "settings.json", run_settings)
        with replacing(pdf) as part:
            part.write_bytes(typst.compile(Path(root) / "report" / "report.typ", root=root, sys_inputs={"run": "/run", "name": run.name}))
    return pdf


def record_environment(run: Run, store: Store) -> dict:
    """Write `environment.json`: versions, hardware, git commit, seeds, and what the data were; return it."""
    run.write_settings()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = dict(
        python=platform.python_version(), **{package.replace("-", "_"): version(package) for package in PACKAGES},
        platform=platform.platform(), cpu=_cpu_name(), cores=os.cpu_count(), gpu=gpu, git_commit=_git_commit(),
        seeds=list(range(run.settings.seeds)), data_hash=store.sha, date=date.today().isoformat(), dataset=describe(store),
        sample_rate=store.sample_rate,
    )
    write_text(run.folder / "environment.json", json.dumps(found, indent=2) + "\n")
    return found


def describe(store: Store) -> dict:
    """Name, stems, and tracks and hours per split of a store."""
    splits = {split: store.split(split) for split in ("train", "valid", "test")}
    hours = {split: sum(track.samples for track in tracks) / store.sample_rate / 3600 for split, tracks in splits.items()}
    tracks = {split: len(tracks) for split, tracks in splits.items()}
    return dict(name=Path(store.source).name, stems=list(store.stems), tracks=tracks, hours=hours)


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
