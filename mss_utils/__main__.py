"""The command line: `python -m mss_utils run | train | check | separate | report | export`. Errors are one sentence and exit status 1."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import signal
import sys
from pathlib import Path

INSTALL = "install what it needs with: make setup, or pip install -r requirements.txt"
try:
    from mss_utils.config import (
        MODELS,
        PROFILES,
        SPLITS,
        Run,
        Settings,
        collection_runs,
        create_or_load_run,
        load_run,
        resolve_settings,
    )
except ImportError as missing:
    sys.exit(f"mss_utils: {missing}; {INSTALL}")

DEFAULT = "demo"  # profile


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mss_utils", description=__doc__.partition(". Errors")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    _add_train(commands)
    _add_check(commands)
    _add_separate(commands)
    _add_report(commands)
    _add_export(commands)
    given = parser.parse_args(arguments)
    try:
        return given.function(given) or 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"mss_utils {given.command}: {_told(error)}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"mss_utils {given.command}: {error}; {INSTALL}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.disable()  # asyncio and Jupyter would say more of it, in tracebacks
        print(
            f"mss_utils {given.command}: stopped; what is finished stays, and the same command goes on.",
            file=sys.stderr,
        )
        return 130


def _told(error: Exception) -> str:
    """What an error says; those of the operating system, which are a number and a word, as a sentence."""
    if isinstance(error, OSError) and error.errno:
        return f"Cannot use {error.filename or 'a file'} ({error.strerror}): check that it is there, what it is, and who may use it."
    return str(error) or f"{type(error).__name__}, without a reason; most often that is memory."


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="", help=f"one of {', '.join(PROFILES)} (default: {DEFAULT})"
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="dataset root (default: the profile's own)"
    )
    parser.add_argument(
        "--target",
        default="",
        metavar="STEM",
        help="stem to extract, several with commas between, or 'all'",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        action="extend",
        help="any other setting",
    )


def _open(given: argparse.Namespace) -> Run:
    return create_or_load_run(
        given.profile or DEFAULT, given.run, given.data, given.target, given.set
    )


def _add_run(commands) -> None:
    parser = commands.add_parser("run", help="run the notebooks in order and write the report")
    _add_settings(parser)
    _add_run_name(parser)
    parser.set_defaults(function=_run)


def _add_run_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        default="",
        metavar="NAME",
        help="name of the run under results/ (default: the profile)",
    )


def _run(given: argparse.Namespace) -> None:
    """A run from its data to its report; a collection, whose runs are finished, is only reported, or with data scored again."""
    if collection_runs(given.run):
        _run_collection(given)
        return
    run = _open(
        given
    )  # before the imports that take seconds: a mistyped setting is answered at once
    from mss_utils.data import check_target_exists
    from mss_utils.environment import check_device
    from mss_utils.pipeline import run_pipeline

    if not (run.folder / "settings.json").exists():  # models that are trained need no device
        check_device(run.settings)
    check_target_exists(run.settings)
    run.write_settings()
    run_pipeline(run)


def _run_collection(given: argparse.Namespace) -> None:
    if given.profile or given.target or given.set:
        runs = ", ".join(run.name for run in collection_runs(given.run))
        raise ValueError(
            f"{given.run!r} is a collection of finished runs ({runs}); it takes --data to be scored again, and no settings."
        )
    if not given.data:
        _report(given)
        return
    from mss_utils.report.collections import rescore

    table = rescore(given.run, given.data)
    print(table.round(4).to_string(index=False))
    print(
        f"largest difference: {table['largest_median_db'].max():.4f} dB of a median, {table['largest_track_db'].max():.4f} dB on a track"
    )


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train", help="train models of a run without notebooks, also under torchrun"
    )
    _add_settings(parser)
    _add_run_name(parser)
    parser.add_argument(
        "--stem",
        default="",
        metavar="STEM",
        help="one of the run's several targets (default: every one)",
    )
    parser.add_argument(
        "--model", nargs="+", default=MODELS, choices=MODELS, help="default: all three"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="one seed, from 0 on (default: every seed of the run)",
    )
    parser.set_defaults(function=_train)


def _train(given: argparse.Namespace) -> None:
    """One model after the other; under `torchrun` this is one of several processes that share every batch."""
    run = _open(given)
    if given.seed is not None and not 0 <= given.seed < run.settings.seeds:
        raise ValueError(
            f"Run {run.name!r} has seeds 0 to {run.settings.seeds - 1}, not {given.seed}: set seeds higher in a new run."
        )
    from mss_utils.data import check_target_exists, open_store
    from mss_utils.training.loop import train, train_in_this_process

    check_target_exists(run.settings)
    store = open_store(run.settings)
    seeds = range(run.settings.seeds) if given.seed is None else [given.seed]
    for stem, model, seed in itertools.product(
        store.targets(given.stem or run.settings.target), given.model, seeds
    ):
        (train_in_this_process if "WORLD_SIZE" in os.environ else train)(
            run, store, stem, model, seed
        )


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="write the report of a finished run again")
    parser.add_argument("--run", required=True, metavar="NAME")
    parser.set_defaults(function=_report)


def _report(given: argparse.Namespace) -> None:
    if collection_runs(given.run):
        from mss_utils.report.collections import write_report

        print(*write_report(given.run), sep="\n")
        return
    from mss_utils.report.typesetting import build_report

    print(build_report(load_run(given.run)))


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export", help="make a collection of finished runs small enough to commit"
    )
    parser.add_argument(
        "--run",
        required=True,
        metavar="NAME",
        help="collection: the folder under results/ that the runs lie in",
    )
    parser.add_argument("--to", required=True, metavar="NAME", help="collection to write")
    parser.add_argument(
        "--complete",
        nargs="*",
        default=[],
        metavar="STEM",
        help="targets of which the weights of all models are kept, not of the best alone",
    )
    parser.add_argument(
        "--listen",
        nargs="*",
        default=[],
        metavar="STEM",
        help="targets in the listening page of built-in songs (default: all)",
    )
    parser.set_defaults(function=_export)


def _export(given: argparse.Namespace) -> None:
    from mss_utils.report.collections import export

    folder = export(given.run, given.to, given.complete, given.listen)
    print(
        f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
    )


def _add_separate(commands) -> None:
    parser = commands.add_parser("separate", help="pull the target out of a song")
    parser.add_argument("song", type=Path, help="in any format that ffmpeg reads, of any length")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="results/<run>/models/<target>/<model>/seed0",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="for the two files (default: here)",
    )
    parser.add_argument(
        "--flac", action="store_true", help="write 24-bit FLAC instead of 32-bit float WAV"
    )
    parser.set_defaults(function=_separate)


def _separate(given: argparse.Namespace) -> None:
    import soundfile

    from mss_utils.models import load_model
    from mss_utils.separation.song_files import bandwidth_note, separate_file

    model = load_model(given.model)
    paths = separate_file(given.song, model, given.out, given.flac)
    with paths[0].open("rb") as stream:
        note = bandwidth_note(model, soundfile.info(stream).samplerate)
    print(*paths, *filter(None, [note]), sep="\n")


def _add_check(commands) -> None:
    parser = commands.add_parser("check", help="look over the environment and a dataset")
    _add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(function=_check)


def _check(given: argparse.Namespace) -> None:
    """Each requirement of a run with how to mend it, then, if none would stop it, what is in the dataset."""
    settings = resolve_settings(given.profile or DEFAULT, given.data, given.target, given.set)
    from mss_utils.environment import STOP, requirements

    needs = []
    for need in requirements(settings):
        needs.append(need)
        if not given.json:
            print(
                f"{need.state:<8} {need.name:<26} {need.found}"
                + f"\n{'':<35} -> {need.mend}" * bool(need.mend),
                flush=True,
            )
    stops = [need.name for need in needs if need.state == STOP]
    found = dict(requirements=list(map(vars, needs)))
    if stops:
        if given.json:
            print(json.dumps(found))
        raise ValueError(
            f"{', '.join(stops)} would stop a run; how to mend that is told with each."
        )
    _check_data(settings, found, given.json)


def _check_data(settings: Settings, found: dict, as_json: bool) -> None:
    """The dataset, decoded (and the built-in songs rendered) where it is not yet: its tracks and their audit, findings are warnings."""
    from mss_utils.data import audit, audit_warnings, co_activity, open_store

    store = open_store(settings)
    table = audit(store)
    about = dict(
        dataset=store.source,
        source_rates=sorted(set(table["source_rate"].tolist())),
        store=str(store.folder),
        store_mb=round(store.n_bytes / 1e6),
        sample_rate=store.sample_rate,
        channels=store.channels,
        stems=store.stems,
        tracks={split: len(store.split(split)) for split in SPLITS},
        minutes={
            split: round(
                sum(track.samples for track in store.split(split)) / store.sample_rate / 60, 1
            )
            for split in SPLITS
        },
        warnings=audit_warnings(store, settings.segment_s),
    )
    if as_json:
        print(json.dumps(found | about))
        return
    print()
    for key, value in about.items():
        print(
            "\n".join(f"warning      {line}" for line in value)
            if key == "warnings"
            else f"{key:<12} {_listed(value)}"
        )
    print("\nmedian over the tracks:")
    shown = ["duration_s", "level_db", "peak", "silent_share", "residual_db"]
    print(table.groupby(["split", "stem"], sort=False)[shown].median().round(2).to_string())
    print("\nof the half seconds in which a row's stem sounds, the share in which a column's does:")
    print(co_activity(store).round(2).to_string())


def _listed(value: object) -> str:
    """A setting or finding without Python's brackets and quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _stop(*_signal) -> None:
    """What asks a process to end, as a batch system does, ends it as Ctrl-C does: tidily."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        if (
            signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN
        ):  # nohup lets it be ignored
            signal.signal(getattr(signal, name), _stop)
    for stream in (sys.stdout, sys.stderr):  # a song's name may hold what the terminal cannot show
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
