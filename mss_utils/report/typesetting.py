"""Compile report/report.typ over the facts and figures of one run or of a collection."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import typst

from mss_utils import figures, listening
from mss_utils.config import MODELS, ROOT, Run, collection_runs, results_folder
from mss_utils.data import is_built_in
from mss_utils.files import atomic_write, write_text
from mss_utils.report.facts import RunData, collect_facts, dump_facts
from mss_utils.report.tables import check_finished, evaluated_targets, read_table
from mss_utils.training import load_history

REPORT = ROOT / "report"
REFERENCE = "reference"  # the committed collection; its report is in report/
PLAYERS_MARK = b'<div id="players"></div>'  # replaced by the listening pages
COLLECTION_FILES = ("more_music.csv", "remarks.txt")  # optional, beside the runs


def build_report(run: Run) -> Path:
    """Write `facts.json` and `report.pdf` of one run; return the path of the PDF.

    FileNotFoundError if the run is not finished; the message names what is missing.
    """
    check_finished(run)
    listening.write_ratings(run)  # answers may have arrived since the notebooks ran
    facts = collect_facts([run], run.name, is_collection=False)
    write_text(run.folder / "facts.json", dump_facts(facts))
    pdf = run.folder / "report.pdf"
    with atomic_write(pdf) as part:
        part.write_bytes(typeset(facts, run.folder))
    return pdf


def write_report(name: str) -> tuple[Path, Path]:
    """Write figures, facts, PDF and HTML page of a collection; return the last two paths.

    They are written to the collection's folder, those of `reference` to report/.
    """
    runs = find_collection(name)
    for run in runs:
        listening.write_ratings(run)
    folder = results_folder() / name
    facts = collect_facts(runs, name, is_collection=True)
    facts["figures"] = draw_figures(name, runs)
    write_text(folder / "facts.json", dump_facts(facts))
    target = REPORT if name == REFERENCE else folder
    pdf, page = target / "report.pdf", target / "report.html"
    with atomic_write(pdf) as part:
        part.write_bytes(typeset(facts, folder))
    with atomic_write(page) as part:
        part.write_bytes(_add_players(typeset(facts, folder, "html"), runs))
    return pdf, page


def find_collection(name: str) -> list[Run]:
    """Return the finished runs of a collection, real music first; ValueError if it has none."""
    runs = sorted(collection_runs(name), key=lambda run: (is_built_in(run.settings), run.name))
    if not runs:
        raise ValueError(
            f"No collection {name!r} under {results_folder()}: make its runs by "
            f"python -m mss_utils run --run {name}/<run>."
        )
    for run in runs:
        check_finished(run)
    return runs


def typeset(facts: dict[str, Any], folder: Path, kind: Literal["pdf", "html"] = "pdf") -> bytes:
    """Compile the report with the figures in `folder`; ValueError with Typst's message on failure.

    Typst reads only below one root, so sources, facts and figures are copied to one folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root, ignore = Path(temporary), shutil.ignore_patterns
        shutil.copytree(REPORT, root / "report", ignore=ignore("*.pdf", "*.html"))
        shutil.copytree(folder / "figures", root / "figures", ignore=ignore("*.png"))
        write_text(root / "facts.json", dump_facts(facts))
        for name in COLLECTION_FILES:
            (root / name).touch()
            if (folder / name).exists():
                shutil.copy(folder / name, root / name)
        source = root / "report" / "report.typ"
        try:
            return typst.compile(source, root=root, format=kind, sys_inputs=dict(format=kind))
        except typst.TypstError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"The report cannot be compiled ({reason}): run again.") from None


def draw_figures(name: str, runs: list[Run]) -> dict[str, str]:
    """Draw the figures of a collection from its tables; return what each shows."""
    runs = [run for run in runs if not RunData(run).is_study] or runs
    parts = [(run, target) for run in runs for target in evaluated_targets(run)]
    longest = max(parts, key=lambda part: part[0].settings.segment_s)
    piano = next((part for part in parts if part[1] == "piano"), parts[-1])
    shown = dict(training=parts[0], phase=parts[0], repetition=longest, attack=piano)
    drawings = {figure: _draw(figure, run, target) for figure, (run, target) in shown.items()}
    scores = {
        (RunData(run).music, target): (read_table(run, "tracks"), read_table(run, "summary"))
        for run, target in parts
    }
    drawings["overview"] = figures.overview(scores)
    own = Run(name, runs[0].settings, results_folder() / name)
    for figure, axes in drawings.items():
        figures.save(axes, own, figure)
    return {figure: f"{target}, {RunData(run).music}" for figure, (run, target) in shown.items()}


def _draw(figure: str, run: Run, target: str) -> Any:
    if figure == "training":
        histories = {}
        for model in MODELS:
            seeds = sorted((run.folder / "models" / target / model).glob("seed*"))
            histories[model] = [load_history(seed) for seed in seeds]
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
