"""Compile report/report.typ over the facts and figures of one run or of a collection."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import typst

from mss_utils import figures, listening
from mss_utils.config import MODELS, ROOT, Run, collection_runs, results_folder
from mss_utils.data import is_built_in
from mss_utils.files import write_bytes, write_text
from mss_utils.report.facts import collect_facts, music, reported_parts
from mss_utils.report.tables import check_finished
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
    write_facts(run.folder, collect_facts([run], run.name, is_collection=False))
    return write_bytes(run.folder / "report.pdf", typeset(run.folder))


def write_report(name: str) -> tuple[Path, Path]:
    """Write figures, facts, PDF and HTML page of a collection; return the last two paths.

    They are written to the collection's folder, those of `reference` to report/.
    """
    runs = find_collection(name)
    for run in runs:
        listening.write_ratings(run)
    folder = results_folder() / name
    facts = collect_facts(runs, name, is_collection=True)
    write_facts(folder, facts | dict(figures=draw_figures(name, runs)))
    target = REPORT if name == REFERENCE else folder
    page = _add_players(typeset(folder, "html"), runs)
    pdf = write_bytes(target / "report.pdf", typeset(folder))
    return pdf, write_bytes(target / "report.html", page)


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


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write facts.json."""
    write_text(folder / "facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def typeset(folder: Path, kind: Literal["pdf", "html"] = "pdf") -> bytes:
    """Compile the report on the facts and figures in `folder`.

    Typst reads only below one root, so sources, facts and figures are copied to one folder.
    ValueError with Typst's message if it fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root, ignore = Path(temporary), shutil.ignore_patterns
        shutil.copytree(REPORT, root / "report", ignore=ignore("*.pdf", "*.html"))
        shutil.copytree(folder / "figures", root / "figures", ignore=ignore("*.png"))
        for name in ("facts.json", *COLLECTION_FILES):
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
    parts = reported_parts(runs)
    first = parts[0]
    longest = max(parts, key=lambda part: part.run.settings.segment_s)
    piano = next((part for part in parts if part.target == "piano"), parts[-1])
    folders = {model: first.run.model_folder(first.target, model).parent for model in MODELS}
    histories = {
        model: [load_history(seed) for seed in sorted(folder.glob("seed*"))]
        for model, folder in folders.items()
    }
    scores = {
        (music(part.run), part.target): (part.rows("tracks"), part.rows("summary"))
        for part in parts
    }
    drawings = dict(
        overview=figures.overview(scores),
        training=figures.training_curves(histories),
        bottleneck=figures.bottleneck(
            longest.rows("bottleneck"), longest.rows("tracks"), longest.target
        ),
        phase=figures.phase(first.rows("phase"), first.target),
        repetition=figures.damaged_repeat(longest.rows("repetition"), longest.target),
        attack=figures.attack(piano.rows("envelopes"), piano.rows("attack"), piano.target),
    )
    own = Run(name, first.run.settings, results_folder() / name)
    for figure, axes in drawings.items():
        figures.save(axes, own, figure)
    shown = dict(training=first, bottleneck=longest, phase=first, repetition=longest, attack=piano)
    return {figure: f"{part.target}, {music(part.run)}" for figure, part in shown.items()}


def _add_players(page: bytes, runs: list[Run]) -> bytes:
    """Put the listening pages of the runs into the HTML report."""
    paths = [run.folder / "listening.html" for run in runs]
    frames = [
        str(listening.frame(path.read_text("utf-8"), f"players: {path.parent.name}", 900).data)
        for path in paths
        if path.exists()
    ]
    content = "".join(frames) or "<p>This collection has no listening page.</p>"
    return page.replace(PLAYERS_MARK, content.encode())
