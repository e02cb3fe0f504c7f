"""Compile report/report.typ over the facts and figures of one run or of a collection."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import typst

from mss_utils import figures, listening
from mss_utils.config import MODELS, ROOT, Run, collection_runs, results_folder
from mss_utils.files import atomic_write, write_text
from mss_utils.report.facts import RunData, collect_facts, dump_facts, sort_runs
from mss_utils.report.tables import check_finished, read_table

REPORT = ROOT / "report"
REFERENCE = "reference"  # the committed collection; its report is in report/
PLAYERS_MARK = b'<div id="players"></div>'  # replaced by the listening pages
COLLECTION_FILES = ("more_music.csv", "remarks.txt")  # optional, beside the runs


def build_report(run: Run) -> Path:
    """Write `facts.json` and `report.pdf` of one run; return the path of the PDF.

    Raises
    ------
    FileNotFoundError
        The run is not finished; the message names what is missing.
    """
    check_finished(run)
    listening.write_ratings(run)  # answers may have arrived since the notebooks ran
    facts = collect_facts([run], run.name, is_collection=False)
    write_text(run.folder / "facts.json", dump_facts(facts))
    pdf = run.folder / "report.pdf"
    with atomic_write(pdf) as part:
        part.write_bytes(typeset(facts, run.folder / "figures"))
    return pdf


def write_report(name: str) -> tuple[Path, Path]:
    """Write figures, facts, PDF and HTML page of a collection; return the last two paths.

    They are written to the collection's folder, those of `reference` to report/.
    """
    runs = find_collection(name)
    for run in runs:
        check_finished(run)
        listening.write_ratings(run)
    folder = results_folder() / name
    facts = collect_facts(runs, name, is_collection=True)
    facts["figures"] = draw_figures(name, runs)
    write_text(folder / "facts.json", dump_facts(facts))
    target = REPORT if name == REFERENCE else folder
    pdf, page = target / "report.pdf", target / "report.html"
    extra = [folder / file for file in COLLECTION_FILES]
    with atomic_write(pdf) as part:
        part.write_bytes(typeset(facts, folder / "figures", "pdf", extra))
    with atomic_write(page) as part:
        part.write_bytes(_add_players(typeset(facts, folder / "figures", "html", extra), runs))
    return pdf, page


def find_collection(name: str) -> list[Run]:
    """Return the runs of a collection, real music first; ValueError if there are none."""
    runs = sort_runs(collection_runs(name))
    if not runs:
        raise ValueError(
            f"No collection {name!r}: expected finished runs under {results_folder() / name}, made "
            f"by: python -m mss_utils run --run {name}/<run>."
        )
    return runs


def typeset(
    facts: dict[str, Any],
    figure_folder: Path,
    kind: Literal["pdf", "html"] = "pdf",
    extra: Iterable[Path] = (),
) -> bytes:
    """Compile the report as PDF or HTML; ValueError with Typst's message if that fails.

    Typst reads only below one root, so sources, facts and figures are copied to one folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(REPORT, root / "report", ignore=shutil.ignore_patterns("*.pdf", "*.html"))
        shutil.copytree(figure_folder, root / "figures", ignore=shutil.ignore_patterns("*.png"))
        write_text(root / "facts.json", dump_facts(facts))
        for name in COLLECTION_FILES:
            (root / name).touch()
        for path in extra:
            if path.exists():
                shutil.copy(path, root / path.name)
        source = root / "report" / "report.typ"
        try:
            return typst.compile(source, root=root, format=kind, sys_inputs=dict(format=kind))
        except typst.TypstError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"The report cannot be compiled ({reason}): run again.") from None


def draw_figures(name: str, runs: list[Run]) -> dict[str, str]:
    """Draw the figures of a collection from its tables; return what each shows."""
    runs = [run for run in runs if not RunData(run).is_study] or runs
    own = Run(name, runs[0].settings, results_folder() / name)
    parts = []
    for run in runs:
        for target in read_table(run, "summary")["target"].unique():
            parts.append((run, target))
    overview = {
        (RunData(run).music, target): (read_table(run, "tracks"), read_table(run, "summary"))
        for run, target in parts
    }
    figures.save_vector(figures.overview(overview), own, "overview")
    longest = max(parts, key=lambda part: part[0].settings.segment_s)
    piano = next((part for part in parts if part[1] == "piano"), parts[-1])
    shown = dict(training=parts[0], phase=parts[0], repetition=longest, attack=piano)
    for figure, (run, target) in shown.items():
        figures.save_vector(_draw(figure, run, target), own, figure)
    return {figure: f"{target}, {RunData(run).music}" for figure, (run, target) in shown.items()}


def _draw(figure: str, run: Run, target: str) -> Any:
    import pandas as pd

    if figure == "training":
        histories = {
            model: [
                pd.read_csv(path)
                for path in sorted(run.folder.glob(f"models/{target}/{model}/seed*/history.csv"))
            ]
            for model in MODELS
        }
        return figures.training_curves(histories)
    if figure == "phase":
        return figures.phase(read_table(run, "phase"), target)
    if figure == "repetition":
        return figures.damaged_repeat(read_table(run, "repetition"), target)
    return figures.attack(read_table(run, "envelopes"), read_table(run, "attack"), target)


def _add_players(page: bytes, runs: list[Run]) -> bytes:
    """Put the listening pages of the runs into the HTML report."""
    frames = []
    for run in runs:
        path = run.folder / "listening.html"
        if path.exists():
            text = path.read_text(encoding="utf-8")
            frames.append(listening.frame(text, f"players: {run.folder.name}", height=900).data)
    content = "".join(frames) or "<p>This collection has no listening page.</p>"
    return page.replace(PLAYERS_MARK, content.encode())
