"""The command line `python -m mss_utils`. An error is one sentence and exit status 1."""

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
    from mss_utils import config
except ImportError as missing:
    sys.exit(f"mss_utils: {missing}; {INSTALL}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; return the exit status."""
    args = create_parser().parse_args(arguments)
    try:
        COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        logging.disable()  # asyncio and Jupyter would print tracebacks
        message = "interrupted. Finished stages are kept; run the same command again to resume."
        status = 130
    except (ValueError, OSError, FloatingPointError, MemoryError, ImportError) as error:
        message, status = format_error(error), 1
    print(f"mss_utils {args.command}: {message}", file=sys.stderr)
    return status


def format_error(error: Exception) -> str:
    """Return the message of an error; errors of the operating system become a sentence."""
    if isinstance(error, ImportError):
        return f"{error}; {INSTALL}"
    if isinstance(error, OSError) and error.errno:
        path, reason = error.filename or "a file", error.strerror
        return f"Cannot open {path} ({reason}). Check that it exists and that you have permission."
    return str(error) or f"{type(error).__name__} (no details); this is usually out-of-memory."


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    run = argparse.ArgumentParser(add_help=False)
    run.add_argument("--run", default="", help="name under results/ (default: the profile)")
    settings = argparse.ArgumentParser(add_help=False)
    add = settings.add_argument
    add("--profile", default="", help=f"one of {', '.join(config.PROFILES)} (default: demo)")
    add("--data", default="", metavar="DIR", help="dataset root (default: the profile's own)")
    add("--target", default="", metavar="STEM", help="one stem, several with commas, or 'all'")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help="any setting")

    parser = argparse.ArgumentParser(prog="python -m mss_utils")
    add_command = parser.add_subparsers(dest="command", required=True).add_parser
    add_command("run", parents=[settings, run], help="run the notebooks, write the report")
    add = add_command("train", parents=[settings, run], help="only train models").add_argument
    add("--stem", default="", help="one of the run's targets (default: all)")
    add("--model", nargs="+", default=config.MODELS, choices=config.MODELS, help="default: all")
    add("--seed", type=int, help="from 0 on (default: every seed of the run)")
    check = add_command("check", parents=[settings], help="check requirements and a dataset")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    add = add_command("separate", help="separate a song into target and residual").add_argument
    add("song", type=Path, help="in any format that ffmpeg reads, any length")
    add("--model", type=Path, required=True, metavar="DIR", help="models/<target>/<model>/seed0")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="default: this folder")
    add("--flac", action="store_true", help="24-bit FLAC instead of 32-bit WAV")
    report = add_command("report", help="write the report of a finished run again")
    report.add_argument("--run", required=True, metavar="NAME")
    add = add_command("export", help="make a collection small enough to commit").add_argument
    add("--run", required=True, metavar="NAME", help="collection to copy")
    add("--to", required=True, metavar="NAME", help="collection to write")
    add("--complete", nargs="*", default=[], metavar="STEM", help="with the weights of all models")
    add("--listen", nargs="*", default=[], metavar="STEM", help="in the players (default: all)")
    return parser


# The commands import what they need: a wrong setting is reported before slow imports.


def _run(args: argparse.Namespace) -> None:
    """Run from data to report; a collection is reported, or with --data scored again."""
    if args.run and config.collection_runs(args.run):
        if args.profile or args.target or args.set:
            raise ValueError(f"{args.run!r} is a collection of runs: it takes --data only.")
        if args.data:
            _rescore(args)
        else:
            _report(args)
        return
    run = config.create_or_load_run(args.profile, args.run, args.data, args.target, args.set)
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
    median, track = table[["largest_median_db", "largest_track_db"]].max()
    print(f"largest difference: {median:.4f} dB of a median, {track:.4f} dB on a track")


def _train(args: argparse.Namespace) -> None:
    """Train one model after the other; under `torchrun` this is one of several processes."""
    run = config.create_or_load_run(args.profile, args.run, args.data, args.target, args.set)
    seeds = range(run.settings.seeds)
    if args.seed is not None and args.seed not in seeds:
        raise ValueError(f"Run {run.name!r} has seeds 0 to {seeds[-1]}: set seeds in a new run.")
    from mss_utils.data import check_target_exists, open_store
    from mss_utils.training import train, train_in_this_process

    check_target_exists(run.settings)
    store = open_store(run.settings)
    seeds = seeds if args.seed is None else [args.seed]
    start = train_in_this_process if "WORLD_SIZE" in os.environ else train
    for stem in store.targets(args.stem or run.settings.target):
        for model in args.model:
            for seed in seeds:
                start(run, store, stem, model, seed)


def _report(args: argparse.Namespace) -> None:
    from mss_utils.report import build_report, write_report

    if config.collection_runs(args.run):
        print(*write_report(args.run), sep="\n")
    else:
        print(build_report(config.load_run(args.run)))


def _export(args: argparse.Namespace) -> None:
    from mss_utils.report.export import export

    folder = export(args.run, args.to, args.complete, args.listen)
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {n_bytes / 1e6:.1f} MB")


def _separate(args: argparse.Namespace) -> None:
    from mss_utils.models import load_model
    from mss_utils.separation import separate_file

    paths = separate_file(args.song, load_model(args.model), args.out, args.flac)
    print(*paths, sep="\n")


def _check(args: argparse.Namespace) -> None:
    """Print every requirement; if none stops a run, check the dataset too."""
    settings = config.resolve_settings(args.profile, args.data, args.target, args.set)
    from mss_utils.checks import STOP, requirements

    findings = []
    for finding in requirements(settings):
        findings.append(vars(finding))
        if not args.json:
            print(f"{finding.state:<8} {finding.name:<26} {finding.found}", flush=True)
            if finding.remedy:
                print(f"{'':<35} -> {finding.remedy}", flush=True)
    stops = ", ".join(finding["name"] for finding in findings if finding["state"] == STOP)
    facts = {} if stops else _check_dataset(settings, args.json)
    if args.json:
        print(json.dumps(dict(requirements=findings) | facts))
    if stops:
        raise ValueError(f"{stops}: a run would stop. The remedies are listed above.")


def _check_dataset(settings: config.Settings, as_json: bool) -> dict[str, Any]:
    """Decode the dataset and return facts about it; unless `as_json`, print its audit."""
    from mss_utils.data import audit, audit_warnings, co_activity, open_store
    from mss_utils.environment import describe_dataset

    store = open_store(settings)
    table, dataset = audit(store), describe_dataset(store)
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
        return facts | dict(warnings=warnings)
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
    return facts


COMMANDS = dict(
    run=_run, train=_train, check=_check, separate=_separate, report=_report, export=_export
)

if __name__ == "__main__":
    for request in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(request) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(request, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # file names may have characters without a glyph
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
