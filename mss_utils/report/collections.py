"""A collection: finished runs side by side under one folder of `results/`, reported as one.

    results/full/<run>/ --export--> results/reference/<run>/ --write_report--> report/report.pdf, report/report.html
                                                  + the data --rescore--> results/reference-rescored/<run>/

A collection is a folder of runs that has no settings of its own. What is exported is small enough to commit, is reported without data
or training, and can be scored again with its own weights. Nothing is trained here.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
from safetensors.torch import load_file

from mss_utils import evaluation, figures, listening
from mss_utils.analysis import attack, repetition
from mss_utils.analysis.hypotheses import NEGLIGIBLE_DB
from mss_utils.config import (
    MODELS,
    Run,
    collection_runs,
    expand_path,
    resolve_settings,
    results_folder,
)
from mss_utils.data import Store, is_built_in, open_store
from mss_utils.environment import dataset_kind
from mss_utils.evaluation.bsseval import MAX_SCORE_DB, TRACK_METRICS
from mss_utils.evaluation.scores import score
from mss_utils.evaluation.statistics import MIN_SEEDS
from mss_utils.files import atomic_write, file_lock, safe_name, temporary_folder, write_text
from mss_utils.models import build_model
from mss_utils.report.notebooks import read_notebook, strip_heavy_outputs
from mss_utils.report.typesetting import REPORT, TABLES, lay_out, lay_out_sources, typeset
from mss_utils.separation import read_estimate, write_estimates
from mss_utils.training.checkpoints import write_tensors

REFERENCE = "reference"  # the collection in the repository: its report lies in report/
# Of the collection itself, where they are there: a table, and what whoever made the runs has to say of them.
OWN_FILES = {
    "more_music.csv": "target,music,model\n",
    "remarks.txt": "",
}  # with what an absent one holds
RULES = dict(  # numbers of the method that the report tells
    negligible_db=NEGLIGIBLE_DB,
    min_seeds=MIN_SEEDS,
    far_s=repetition.FAR_S,
    burst_db=-repetition.BURST_DB,
    apart_s=attack.APART_S,
    attack_s=attack.ATTACK_S,
    before_s=attack.BEFORE_S,
)
MAX_TABLE = 60_000  # characters; a longer table is packed
COMPRESSION = 0.5  # of the sounds in an exported listening page, see `encode_mp3`
SIGNIFICANT = "%.6g"  # digits of a number in an exported table
PLAYERS_MARK = b'<div id="players"></div>'  # where collection.typ wants the listening page


def collected(name: str) -> list[Run]:
    """The runs of a collection, those on the built-in songs last; ValueError where there are none."""
    runs = collection_runs(name)
    if not runs:
        place = results_folder() / name
        raise ValueError(
            f"No collection {name!r}: expected runs under {place}, each finished by: python -m mss_utils run --run {name}/<run>."
        )
    return sorted(runs, key=lambda run: (is_built_in(run.settings), run.name))


def music_of(run: Run) -> str:
    """What a figure calls the data of a run."""
    dataset = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))["dataset"]
    return dict(songs="built-in songs", excerpts="MUSDB18 excerpts", musdb="MUSDB18").get(
        dataset_kind(run.settings, dataset), run.folder.name
    )


def is_study(run: Run) -> bool:
    """Whether a run was made for an ablation or for the amount of data: its scores are no part of the results."""
    return bool(run.settings.ablations) or run.settings.data_study


def targets_of(run: Run) -> list[str]:
    """The targets of a run that has been evaluated."""
    summary = table_of(run, "summary")
    if "target" not in summary:
        raise ValueError(
            f"{run.table('summary')} has the columns {', '.join(summary)}; expected target among them: run {run.name!r} again."
        )
    return summary["target"].unique().tolist()


# --- exporting ----------------------------------------------------------------------------------------------------------


def export(
    source: str, name: str, complete: Collection[str] = (), heard: Collection[str] = ()
) -> Path:
    """Copy the collection `source` to `results/<name>/`, small enough to commit, and return that folder.

    Kept are settings, environment, tables (six digits a number), notebooks without heavy outputs, training histories,
    weights in half precision (see `kept_weights`), and a listening page of built-in songs with the targets in `heard` (default: all): no
    other audio may be passed on. Listeners' answers stay. The folder takes the place of an older one when everything is there. Raises ValueError for a collection
    without runs or a target that none of them has, FileNotFoundError for a run that is not finished.
    """
    runs, folder = collected(source), _destination(name)
    if folder.resolve() == (results_folder() / source).resolve():
        raise ValueError(f"{folder} is the collection itself: export to another name.")
    for run in runs:
        _check_finished(run)
    known = {target for run in runs for target in targets_of(run)}
    if unknown := [target for target in (*complete, *heard) if target not in known]:
        raise ValueError(
            f"No run of {source!r} has the target {unknown[0]!r}; there are: {', '.join(sorted(known))}."
        )
    with file_lock(folder.parent), temporary_folder(folder.parent) as part:
        root, weights = part / folder.name, kept_weights(runs, complete)
        for run in runs:
            copy = Run(f"{name}/{run.folder.name}", run.settings, root / run.folder.name)
            _export_run(
                run,
                copy.folder,
                [(target, model) for owner, target, model in weights if owner == run],
            )
            if is_built_in(run.settings) and not is_study(run):
                page = _page_for(
                    run,
                    copy.name,
                    [target for target in targets_of(run) if target in heard or not heard],
                )
                write_text(copy.folder / "listening.html", page)
            if (answers := folder / run.folder.name / "answers").is_dir():
                shutil.copytree(answers, copy.folder / "answers", dirs_exist_ok=True)
        for file in OWN_FILES:
            if (own := results_folder() / source / file).exists():
                write_text(root / file, own.read_text(encoding="utf-8"))
        if folder.exists():
            folder.rename(_older(folder))
        root.rename(folder)
        shutil.rmtree(_older(folder), ignore_errors=True)
    return folder


def _older(folder: Path) -> Path:
    """What a collection is called for the moment in which a new one takes its place."""
    return folder.with_name(f".older-{folder.name}")


def _destination(name: str) -> Path:
    """The folder of an export, which may take the place of an older one but of nothing else."""
    folder = results_folder() / name
    if safe_name(name) != name:
        raise ValueError(
            f"A collection's name may hold letters, digits, '.', '_' and '-', not {name!r}."
        )
    if _older(folder).exists():  # an export was killed in that moment
        shutil.rmtree(_older(folder)) if folder.exists() else _older(folder).rename(folder)
    if folder.exists() and not collection_runs(name):
        raise ValueError(f"{folder} is there and no collection: export to another name.")
    return folder


def kept_weights(runs: Iterable[Run], complete: Collection[str] = ()) -> list[tuple[Run, str, str]]:
    """Run, target and model of the weights that an export keeps: each target once, from the first run that has it.

    For targets in `complete` all models, for the others the one with the best validation score; first seeds.
    """
    kept, seen = [], set()
    for run in runs:
        for target in [] if is_study(run) else targets_of(run):
            if target not in seen:
                seen.add(target)
                best = max(MODELS, key=lambda model: described(run, target, model)["valid_sdr"])
                kept += [
                    (run, target, model) for model in MODELS if target in complete or model == best
                ]
    return kept


def described(run: Run, target: str, model: str, seed: int = 0) -> dict:
    """model.json of a trained model."""
    return json.loads(
        (run.model_folder(target, model, seed) / "model.json").read_text(encoding="utf-8")
    )


def table_of(run: Run, name: str) -> pd.DataFrame:
    """A table of a run, which an export may have packed."""
    path = run.table(name) if run.table(name).exists() else run.table(name).with_suffix(".csv.gz")
    try:
        return pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' errors are ValueErrors, those of gzip OSErrors
        raise ValueError(f"{path} is no table ({error}): run {run.name!r} again.") from None


def _check_finished(run: Run) -> None:
    needed = [run.folder / "environment.json", *map(run.table, TABLES)]
    if missing := [
        path for path in needed if not path.exists() and not path.with_suffix(".csv.gz").exists()
    ]:
        profile = run.settings.profile
        raise FileNotFoundError(
            f"Run {run.name!r} lacks {missing[0]}: finish it first (make report PROFILE={profile} RUN={run.name})."
        )


def _export_run(run: Run, folder: Path, weights: list[tuple[str, str]]) -> None:
    for name in ("settings.json", "environment.json"):
        write_text(folder / name, (run.folder / name).read_text(encoding="utf-8"))
    for table in TABLES:
        _write_table(table_of(run, table), folder / "tables" / f"{table}.csv")
    for name in sorted(path.stem for path in run.folder.glob("notebooks/*.ipynb")):
        executed = run.folder / "notebooks" / f"{name}.ipynb"
        if executed.exists():
            write_text(
                folder / "notebooks" / executed.name,
                nbformat.writes(strip_heavy_outputs(read_notebook(executed))),
            )
    for path in sorted(run.folder.glob("models/*/*/seed*/*")):
        if path.name in ("model.json", "history.csv"):
            write_text(folder / path.relative_to(run.folder), path.read_text(encoding="utf-8"))
    for target, model in weights:
        kept = run.model_folder(target, model) / "model.safetensors"
        halves = {
            key: tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in load_file(kept).items()
        }
        if too_large := [key for key, tensor in halves.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"{kept}: {too_large[0]} does not fit into half precision; this model cannot be exported."
            )
        write_tensors(folder / kept.relative_to(run.folder), halves)


def _page_for(run: Run, name: str, targets: list[str]) -> str:
    """A listening page of a run whose answers are about its copy, `name`, of which not all weights are kept that would identify its models."""
    store, tracks = open_store(run.settings), table_of(run, "tracks")
    found = {target: listening.excerpts(run, store, target, tracks) for target in targets}
    return listening.recoded(
        listening.listening_page(run, store, tracks, found, name, None), COMPRESSION
    )


def _write_table(table: pd.DataFrame, destination: Path) -> None:
    text = table.to_csv(index=False, float_format=SIGNIFICANT)
    if len(text) < MAX_TABLE:
        write_text(destination, text)
    else:
        with atomic_write(destination.with_suffix(".csv.gz")) as part:
            part.write_bytes(gzip.compress(text.encode(), mtime=0))


# --- figures ------------------------------------------------------------------------------------------------------------


def draw(name: str, runs: list[Run]) -> dict[str, tuple[str, str]]:
    """Draw the figures of a collection's report as `results/<name>/figures/<figure>.svg`, from tables, histories and settings alone.

    Returns which run and target each of `training`, `phase`, `repeat` and `attack` shows: the first ones there are; for `repeat`
    those with the longest segments; for `attack` the piano where there is one.
    """
    own = Run(name, runs[0].settings, results_folder() / name)
    parts = [(run, target) for run in runs for target in targets_of(run)]
    tracks_and_summary = lambda run: (table_of(run, "tracks"), table_of(run, "summary"))
    figures.save_vector(
        figures.overview(
            {(music_of(run), target): tracks_and_summary(run) for run, target in parts}
        ),
        own,
        "overview",
    )
    figures.save_vector(figures.pipeline(), own, "pipeline")
    for model in MODELS[:2]:  # B2 is drawn as B1, but for one box
        figures.save_vector(
            figures.architecture(build_model(model, own.settings), own.settings),
            own,
            f"architecture_{model}",
        )
    chosen = dict(
        training=parts[0],
        phase=parts[0],
        repeat=max(parts, key=lambda part: part[0].settings.segment_s),
        attack=next((part for part in parts if part[1] == "piano"), parts[-1]),
    )
    for figure, (run, target) in chosen.items():
        figures.save_vector(_axes_of(figure, run, target), own, figure)
    return {figure: (run.folder.name, target) for figure, (run, target) in chosen.items()}


def _axes_of(figure: str, run: Run, target: str):
    table = partial(table_of, run)
    if figure == "training":
        paths = {
            model: sorted(run.folder.glob(f"models/{target}/{model}/seed*/history.csv"))
            for model in MODELS
        }
        return figures.training_curves(
            {model: list(map(pd.read_csv, found)) for model, found in paths.items()}
        )
    if figure == "phase":
        return figures.phase(table("phase"), target)
    if figure == "repeat":
        return figures.repeat(table("long_range"), table("tracks"), table("hypotheses"), target)
    return figures.attack(table("envelopes"), table("transients"), target)


# --- the report ---------------------------------------------------------------------------------------------------------


def write_report(name: str) -> tuple[Path, Path]:
    """Draw the figures of a collection anew and set its report, as PDF and as one HTML page with the players inside; return both.

    They lie in the collection's folder, those of `REFERENCE` in `report/`. Raises ValueError for no collection, FileNotFoundError
    naming what a run lacks.
    """
    runs = collected(name)
    for run in runs:
        _check_finished(run)
        listening.ratings_of(run)  # answers may have come in
    shown = draw(name, [run for run in runs if not is_study(run)] or runs)
    folder = REPORT if name == REFERENCE else results_folder() / name
    pdf, page = folder / "report.pdf", folder / "report.html"
    with tempfile.TemporaryDirectory() as root:
        _lay_out(Path(root), name, runs, shown)
        sources = dict(name=name, runs=",".join(run.folder.name for run in runs))
        compiled = lambda kind: typeset(Path(root), "collection.typ", kind, **sources, format=kind)
        for path, content in ((pdf, compiled("pdf")), (page, with_players(compiled("html"), runs))):
            with atomic_write(path) as part:
                part.write_bytes(content)
    return pdf, page


def _lay_out(root: Path, name: str, runs: list[Run], shown: dict) -> None:
    """Sources, tables and figures side by side below the one root that Typst reads."""
    lay_out_sources(root)
    for run in runs:
        copy = root / "runs" / run.folder.name
        lay_out(run, copy, music=music_of(run), study=is_study(run))
        for packed in copy.glob("tables/*.csv.gz"):
            packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        write_text(
            copy / "profile.json", resolve_settings(run.settings.profile).model_dump_json(indent=2)
        )  # what differs is told
    write_text(root / "runs" / "rules.json", json.dumps(RULES))
    shutil.copytree(results_folder() / name / "figures", root / "runs" / "figures")
    write_text(root / "runs" / "shown.json", json.dumps(shown))
    for file, nothing in OWN_FILES.items():
        own = results_folder() / name / file
        write_text(
            root / "runs" / file,
            own.read_text(encoding="utf-8", errors="replace") if own.exists() else nothing,
        )


def with_players(page: bytes, runs: Iterable[Run]) -> bytes:
    """The HTML report with the listening pages of the runs that have one in the place that is marked for them."""
    found = [
        run.folder / "listening.html" for run in runs if (run.folder / "listening.html").exists()
    ]
    frames = [
        listening.frame(
            path.read_text(encoding="utf-8"), f"players: {path.parent.name}", height=900
        ).data
        for path in found
    ]
    return page.replace(
        PLAYERS_MARK, "".join(frames).encode() or b"<p>This collection has no listening page.</p>"
    )


# --- scoring again ------------------------------------------------------------------------------------------------------


def rescore(name: str, data: str) -> pd.DataFrame:
    """Separate and score the test tracks again with the weights that a collection holds; returns how far the scores moved.

    Columns run, target, model, tracks, largest_track_db (over tracks and metrics) and largest_median_db (of the rows of the summary).
    `data` is the dataset of the runs that are not on the built-in songs, whose test songs are rendered. Written as
    `results/<name>-rescored/<run>/tables/tracks.csv` and `results/<name>-rescored/differences.csv`. Raises ValueError when
    there are no weights, or the test tracks of the data are not those of the table.
    """
    runs = [run for run in collected(name) if kept_models(run)]
    if not runs:
        raise ValueError(
            f"No weights in {results_folder() / name}; expected models/<target>/<model>/seed0/model.safetensors in one of its runs."
        )
    stores = [
        _test_store(run, data) for run in runs
    ]  # whatever is wrong with the data is said before anything is separated
    again = [
        pd.concat(
            [
                score_again(run, store, target, models)
                for target, models in kept_models(run).items()
            ],
            ignore_index=True,
        )
        for run, store in zip(runs, stores)
    ]
    table = pd.DataFrame(
        [
            row
            for run, tracks in zip(runs, again)
            for row in _moved(run, table_of(run, "tracks"), tracks)
        ]
    )
    for run, tracks in zip(runs, again):
        write_text(
            results_folder() / f"{name}-rescored" / run.folder.name / "tables" / "tracks.csv",
            tracks.to_csv(index=False),
        )
    write_text(results_folder() / f"{name}-rescored" / "differences.csv", table.to_csv(index=False))
    return table


def _test_store(run: Run, data: str) -> Store:
    """The test tracks of a run; of built-in songs no more is rendered than a store needs."""
    few = (
        dict(n_train_songs=1, n_valid_songs=1)
        if is_built_in(run.settings)
        else dict(data=str(expand_path(data)))
    )
    store = open_store(run.settings.model_copy(update=few))
    wanted = set(table_of(run, "tracks")[["track", "frames"]].itertuples(index=False, name=None))
    found = {
        (track.name, max(1, track.samples // store.sample_rate)) for track in store.split("test")
    }
    if wanted != found:
        odd, seconds = sorted(wanted ^ found)[0]
        raise ValueError(
            f"The test tracks of {store.source} are not those that run {run.name!r} was scored on ({odd!r} of {seconds} s is in one only): "
            "give its own dataset."
        )
    return store


def kept_models(run: Run) -> dict[str, list[str]]:
    """The models of a run whose weights are there (first seeds), by target; targets without any are left out."""
    there = {
        target: [
            model
            for model in MODELS
            if (run.model_folder(target, model) / "model.safetensors").exists()
        ]
        for target in targets_of(run)
    }
    return {target: models for target, models in there.items() if models}


def score_again(run: Run, store: Store, target: str, models: list[str]) -> pd.DataFrame:
    """The table `tracks` of these models on the test tracks of a store, separated and scored now."""

    own = Run(
        f"{run.name}-rescored",
        run.settings.model_copy(update=dict(target=target, seeds=1)),
        results_folder() / f"{run.name.split('/')[0]}-rescored" / run.folder.name,
    )
    write_estimates(own, store, models, trained=run)

    def estimates_of(track) -> evaluation.scores.Estimates:
        return {
            (model, 0): read_estimate(own, store, track, target, model)[None] for model in models
        }

    return score(own.settings, store, estimates_of, n_cross_check=0)["tracks"]


def _moved(run: Run, committed: pd.DataFrame, again: pd.DataFrame) -> Iterable[dict]:
    """How far the scores of each rescored model are from those in the table, first seeds."""
    first = committed[committed["seed"] == 0]
    for (target, model), rows in again.groupby(["target", "model"], sort=False):
        before = first[(first["target"] == target) & (first["model"] == model)].set_index("track")[
            list(TRACK_METRICS)
        ]
        after = rows.set_index("track")[list(TRACK_METRICS)].reindex(before.index)
        if (lost := (before.isna() != after.isna()).any(axis=1)).any():
            raise ValueError(
                f"{lost.idxmax()!r} has a score of {model} on {target} in one of the two tables only: {run.name} was scored on other audio."
            )
        median = lambda table: table.clip(upper=MAX_SCORE_DB).median()
        yield dict(
            run=run.folder.name,
            target=target,
            model=model,
            tracks=len(rows),
            largest_track_db=(before - after).abs().max().max(),
            largest_median_db=(median(before) - median(after)).abs().max(),
        )
