"""The command line: `python -m mss_utils run | train | check | separate | report | export`.

An error is one sentence and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

INSTALL = "install the requirements: make setup, or pip install -r requirements.txt"
try:
    from mss_utils.config import (
        MODELS,
        PROFILES,
        Run,
        Settings,
        collection_runs,
        create_or_load_run,
        load_run,
        resolve_settings,
    )
except ImportError as missing:
    sys.exit(f"mss_utils: {missing}; {INSTALL}")

DEFAULT_PROFILE = "demo"


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; return the exit status."""
    args = create_parser().parse_args(arguments)
    try:
        args.function(args)
        return 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        message, status = format_error(error), 1
    except ImportError as error:
        message, status = f"{error}; {INSTALL}", 1
    except KeyboardInterrupt:
        logging.disable()  # asyncio and Jupyter would print tracebacks
        message = "interrupted. Finished stages are kept; run the same command again to resume."
        status = 130
    print(f"mss_utils {args.command}: {message}", file=sys.stderr)
    return status


def format_error(error: Exception) -> str:
    """Return the message of an error; errors of the operating system become a sentence."""
    if isinstance(error, OSError) and error.errno:
        path = error.filename or "a file"
        reason = error.strerror
        return f"Cannot open {path} ({reason}). Check that it exists and that you have permission."
    return str(error) or f"{type(error).__name__} (no details); this is usually out-of-memory."


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m mss_utils", description=description)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run the notebooks in order and write the report")
    run.set_defaults(function=_run)
    train = commands.add_parser("train", help="train models without notebooks, or under torchrun")
    train.set_defaults(function=_train)
    check = commands.add_parser("check", help="check requirements and a dataset")
    check.set_defaults(function=_check)
    for command in (run, train, check):
        _add_settings(command)
    for command in (run, train):
        command.add_argument("--run", default="", help="name under results/ (default: the profile)")
    train.add_argument("--stem", default="", help="one of the run's targets (default: all)")
    train.add_argument("--model", nargs="+", default=MODELS, choices=MODELS, help="default: all")
    train.add_argument("--seed", type=int, help="from 0 on (default: every seed of the run)")
    check.add_argument("--json", action="store_true", help="print one JSON object")

    separate = commands.add_parser("separate", help="separate a song into target and residual")
    separate.set_defaults(function=_separate)
    separate.add_argument("song", type=Path, help="in any format that ffmpeg reads, any length")
    model_help = "results/<run>/models/<target>/<model>/seed0"
    separate.add_argument("--model", type=Path, required=True, metavar="DIR", help=model_help)
    out_help = "folder of the two files (default: here)"
    separate.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help=out_help)
    separate.add_argument("--flac", action="store_true", help="24-bit FLAC instead of 32-bit WAV")

    report = commands.add_parser("report", help="write the report of a finished run again")
    report.set_defaults(function=_report)
    report.add_argument("--run", required=True, metavar="NAME")

    export = commands.add_parser("export", help="make a collection small enough to commit")
    export.set_defaults(function=_export)
    export.add_argument("--run", required=True, metavar="NAME", help="collection to copy")
    export.add_argument("--to", required=True, metavar="NAME", help="collection to write")
    complete_help = "targets of which the weights of all models are kept"
    export.add_argument("--complete", nargs="*", default=[], metavar="STEM", help=complete_help)
    listen_help = "targets in the listening page of built-in songs (default: all)"
    export.add_argument("--listen", nargs="*", default=[], metavar="STEM", help=listen_help)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    profiles = f"one of {', '.join(PROFILES)} (default: {DEFAULT_PROFILE})"
    parser.add_argument("--profile", default="", help=profiles)
    data_help = "dataset root (default: the profile's own)"
    parser.add_argument("--data", default="", metavar="DIR", help=data_help)
    target_help = "stem to extract, several separated by commas, or 'all'"
    parser.add_argument("--target", default="", metavar="STEM", help=target_help)
    set_help = "any other setting"
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help=set_help
    )


def _open_run(args: argparse.Namespace) -> Run:
    profile = args.profile or DEFAULT_PROFILE
    return create_or_load_run(profile, args.run, args.data, args.target, args.set)


# The commands import what they need: a wrong setting is reported before slow imports.


def _run(args: argparse.Namespace) -> None:
    """Run from data to report; a collection is reported, or with --data scored again."""
    if runs := collection_runs(args.run):
        if args.profile or args.target or args.set:
            names = ", ".join(run.name for run in runs)
            raise ValueError(
                f"{args.run!r} is a collection of finished runs ({names}): it takes --data to be "
                "scored again, and no settings."
            )
        if args.data:
            _rescore(args)
        else:
            _report(args)
        return
    run = _open_run(args)
    from mss_utils.data import check_target_exists
    from mss_utils.environment import check_device
    from mss_utils.pipeline import run_pipeline

    if not (run.folder / "settings.json").exists():  # trained models need no device
        check_device(run.settings)
    check_target_exists(run.settings)
    run.write_settings()
    run_pipeline(run)


def _rescore(args: argparse.Namespace) -> None:
    from mss_utils.report.export import rescore

    table = rescore(args.run, args.data)
    print(table.round(4).to_string(index=False))
    median, track = table["largest_median_db"].max(), table["largest_track_db"].max()
    print(f"largest difference: {median:.4f} dB of a median, {track:.4f} dB on a track")


def _train(args: argparse.Namespace) -> None:
    """Train one model after the other; under `torchrun` this is one of several processes."""
    run = _open_run(args)
    n_seeds = run.settings.seeds
    if args.seed is not None and not 0 <= args.seed < n_seeds:
        raise ValueError(
            f"Run {run.name!r} has seeds 0 to {n_seeds - 1}, not {args.seed}: set seeds higher "
            "in a new run."
        )
    from mss_utils.data import check_target_exists, open_store
    from mss_utils.training import train, train_in_this_process

    check_target_exists(run.settings)
    store = open_store(run.settings)
    seeds = range(n_seeds) if args.seed is None else [args.seed]
    stems = store.targets(args.stem or run.settings.target)
    start = train_in_this_process if "WORLD_SIZE" in os.environ else train
    for stem in stems:
        for model in args.model:
            for seed in seeds:
                start(run, store, stem, model, seed)


def _report(args: argparse.Namespace) -> None:
    if collection_runs(args.run):
        from mss_utils.report import write_report

        print(*write_report(args.run), sep="\n")
    else:
        from mss_utils.report import build_report

        print(build_report(load_run(args.run)))


def _export(args: argparse.Namespace) -> None:
    from mss_utils.report.export import export

    folder = export(args.run, args.to, args.complete, args.listen)
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {n_bytes / 1e6:.1f} MB")


def _separate(args: argparse.Namespace) -> None:
    import soundfile

    from mss_utils.models import load_model
    from mss_utils.separation import bandwidth_note, separate_file

    model = load_model(args.model)
    paths = separate_file(args.song, model, args.out, args.flac)
    print(*paths, sep="\n")
    with paths[0].open("rb") as stream:
        note = bandwidth_note(model, soundfile.info(stream).samplerate)
    if note:
        print(note)


def _check(args: argparse.Namespace) -> None:
    """Print every requirement; if none stops a run, check the dataset too."""
    profile = args.profile or DEFAULT_PROFILE
    settings = resolve_settings(profile, args.data, args.target, args.set)
    from mss_utils.checks import STOP, requirements

    findings = []
    for finding in requirements(settings):
        findings.append(finding)
        if not args.json:
            print(f"{finding.state:<8} {finding.name:<26} {finding.found}", flush=True)
            if finding.remedy:
                print(f"{'':<35} -> {finding.remedy}", flush=True)
    result: dict[str, Any] = dict(requirements=[vars(finding) for finding in findings])
    stops = [finding.name for finding in findings if finding.state == STOP]
    if stops:
        if args.json:
            print(json.dumps(result))
        raise ValueError(f"{', '.join(stops)}: a run would stop. The remedies are listed above.")
    _check_dataset(settings, result, args.json)


def _check_dataset(settings: Settings, result: dict[str, Any], as_json: bool) -> None:
    """Decode the dataset and print its audit."""
    from mss_utils.data import audit, audit_warnings, co_activity, open_store
    from mss_utils.environment import describe_dataset

    store = open_store(settings)
    table = audit(store)
    dataset = describe_dataset(store)
    facts = dict(
        dataset=store.source,
        source_rates=sorted(set(table["source_rate"].tolist())),
        store=str(store.folder),
        store_mb=round(sum(store.raw(track).nbytes for track in store.tracks) / 1e6),
        sample_rate=store.sample_rate,
        channels=store.channels,
        stems=store.stems,
        tracks=dataset["tracks"],
        minutes={split: round(60 * hours, 1) for split, hours in dataset["hours"].items()},
    )
    warnings = audit_warnings(store, settings.segment_s)
    if as_json:
        print(json.dumps(result | facts | dict(warnings=warnings)))
        return
    print()
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{name} {item}" for name, item in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{key:<12} {text}")
    for warning in warnings:
        print(f"warning      {warning}")
    columns = ["duration_s", "level_db", "peak", "silent_share", "residual_db"]
    medians = table.groupby(["split", "stem"], sort=False)[columns].median()
    print("\nmedian over tracks:", medians.round(2).to_string(), sep="\n")
    print("\nshare of the half seconds with the stem of a row in which that of a column is active:")
    print(co_activity(store).round(2).to_string())


def _interrupt(*_signal: Any) -> None:
    """Handle a request to terminate (from a batch system) like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for request in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(request) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(request, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # file names may have characters without a glyph
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
