"""Compile the Typst report from the tables, facts and figures of a run."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import typst

from mss_utils import analysis, evaluation, listening
from mss_utils.config import ROOT, Run
from mss_utils.environment import dataset_kind
from mss_utils.files import atomic_write, write_text

REPORT = ROOT / "report"
TABLES = (*evaluation.TABLES, *analysis.TABLES, *listening.TABLES)
# Parts of a run's folder that the report does not read.
NOT_READ = (
    "*.ckpt",
    "*.safetensors",
    "*.mp3",
    "*.wav",
    "*.ipynb",
    "*.pdf",
    "*.html",
    "*.png",
    ".*",
    "songs",
    "answers",
    "estimates",
    "ablations",
    "data_study",
)


def build_report(run: Run) -> Path:
    """Compile `report/report.typ` over the files of `run` to `results/<run>/report.pdf` and return its path.

    Typst reads only below one root: sources and results are copied side by side into a temporary folder. Raises FileNotFoundError
    naming what is missing when the run has not been evaluated, ValueError as `typeset` does.
    """
    tables = (f"tables/{name}.csv" for name in TABLES)
    for needed in ("settings.json", "environment.json", "listening.html", *tables):
        if not any(run.folder.glob(needed)):
            raise FileNotFoundError(
                f"The report of run {run.name!r} needs {run.folder / needed}: finish the run first (make report RUN={run.name})."
            )
    listening.ratings_of(run)  # answers may have come in since the notebooks ran
    pdf = run.folder / "report.pdf"
    with tempfile.TemporaryDirectory() as root:
        lay_out_sources(Path(root))
        lay_out(run, Path(root) / "run")
        with atomic_write(pdf) as part:
            part.write_bytes(typeset(Path(root), "report.typ", run="/run", name=run.name))
    return pdf


def lay_out_sources(root: Path) -> None:
    """Copy what the reports are written in to `report/` below the one root that Typst reads."""
    shutil.copytree(REPORT, root / "report", ignore=shutil.ignore_patterns("*.pdf", "*.html"))


def lay_out(run: Run, copy: Path, **about: object) -> None:
    """Copy what a report reads of a run to the folder `copy`: tables, figures, histories, all settings, and `about.json`."""
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns(*NOT_READ))
    write_text(
        copy / "settings.json", run.settings.model_dump_json(indent=2)
    )  # a run of an older version has not all of them
    try:
        kind = dataset_kind(
            run.settings,
            json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))["dataset"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run.folder / 'environment.json'} does not tell the dataset ({error!r}): run {run.name!r} again."
        ) from None
    write_text(copy / "about.json", json.dumps(about | dict(kind=kind)))


def typeset(root: Path, source: str, kind: str = "pdf", **inputs: str) -> bytes:
    """Compile `report/<source>` below `root`, as PDF or HTML; ValueError where a table or file that it reads is damaged."""
    try:
        return typst.compile(root / "report" / source, root=root, format=kind, sys_inputs=inputs)
    except typst.TypstError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The report cannot be set, most likely because a table or another file of the run is damaged ({reason}): run it again."
        ) from None
