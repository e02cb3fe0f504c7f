"""Killed at any moment, a run goes on with the same command and ends with the very tables of one that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile
from conftest import MSS_UTILS, command, little_run
from safetensors.torch import save_file

from mss_utils import pipeline, report
from mss_utils.config import ROOT, resolve_settings
from mss_utils.models import build_model

LONGEST_S = 14.0  # a run lives between one second and this before it is killed
CLOCKS = {
    "train_s",
    "audio_s_per_s",
    "inference_rtf",
    "peak_memory_mb",
}  # what never comes out the same


def killed_after(
    seconds: float, whole_family: bool, arguments: list[str], environment: dict
) -> bool:
    """Start the command and kill it, alone or with its kernel and workers; False if it had finished before."""
    process = subprocess.Popen(
        [*MSS_UTILS, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | environment,
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True) if whole_family else []
        process.kill()
        for child in family:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait()
        return True


def findings(folder) -> dict:
    """What must not differ: every table and history but for clocks, the weights byte for byte, and what the data were."""
    tables = [*folder.glob("tables/*.csv"), *folder.rglob("history.csv")]
    found = {
        path.relative_to(folder): pd.read_csv(path).drop(columns=CLOCKS, errors="ignore").to_csv()
        for path in tables
    }
    found |= {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("model.safetensors")
    }
    return found | dict(data=json.loads((folder / "environment.json").read_text())["data_hash"])


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    smoke_run, tmp_path, long_form, count
):
    seed = int(os.environ.get("MSS_CHANCE", time.time()))
    print(f"the same moments again: MSS_CHANCE={seed}")
    wanted, chance = findings(smoke_run[1]), random.Random(seed)
    environment = dict(MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache"))
    arguments, folder = (
        ["run", "--profile", "smoke", "--run", "killed"],
        tmp_path / "results" / "killed",
    )
    kills, of = 0, 50 if long_form else 5
    while kills < of:
        if killed_after(
            chance.uniform(1, LONGEST_S), chance.random() < 0.5, arguments, environment
        ):
            kills += 1
        else:  # it got through: compared, and begun anew
            assert findings(folder) == wanted
            shutil.rmtree(tmp_path / "results")
            shutil.rmtree(tmp_path / "cache")
    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert findings(folder) == wanted
    assert not [path for path in tmp_path.rglob("*.part*")]
    count("kills", kills)


def test_an_export_that_is_killed_again_and_again_ends_as_one_that_is_not(
    smoke_run, tmp_path, monkeypatch, long_form, count
):
    def exported(place):
        monkeypatch.setenv("MSS_RESULTS", str(place))
        return report.export("full", "copy")

    places = {name: tmp_path / name for name in ("killed", "whole")}
    for place in places.values():
        shutil.copytree(
            smoke_run[1],
            place / "full" / "songs",
            ignore=shutil.ignore_patterns("ablations", "data_study", "*.ckpt"),
        )
        stored = json.loads((place / "full" / "songs" / "settings.json").read_text()) | dict(
            ablations=[], data_study=False
        )
        (place / "full" / "songs" / "settings.json").write_text(json.dumps(stored))
    arguments, chance, kills = ["export", "--run", "full", "--to", "copy"], random.Random(0), 0
    answers = places["killed"] / "copy" / "songs" / "answers"
    for number in range(20 if long_form else 2):
        kills += killed_after(
            chance.uniform(2, 9), True, arguments, dict(MSS_RESULTS=str(places["killed"]))
        )
        if number == 0:  # what listeners have said of the copy must outlive all of it
            exported(places["killed"])
            answers.mkdir()
            (answers / "ada.json").write_text("mine")
    folders = {name: exported(place) for name, place in places.items()}
    contents = {
        name: {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name, folder in folders.items()
    }
    assert contents["killed"].pop(Path("songs/answers/ada.json")) == b"mine"
    assert contents["killed"] == contents["whole"]
    assert {path.name for path in places["killed"].glob("[!.]*")} == {"full", "copy"} and not list(
        places["killed"].glob(".[!l]*")
    )
    assert kills, "no export lasted long enough to be killed"
    count("kills", kills)


def test_an_export_killed_between_two_names_loses_nothing(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    (tmp_path / ".older-copy" / "songs").mkdir(parents=True)
    shutil.copy(smoke_run[1] / "settings.json", tmp_path / ".older-copy" / "songs")
    assert report._destination("copy") == tmp_path / "copy"
    assert (tmp_path / "copy" / "songs" / "settings.json").exists() and not (
        tmp_path / ".older-copy"
    ).exists()


@pytest.fixture(scope="module")
def song_and_model(tmp_path_factory):
    """A song that takes a while, and a model to separate it with."""
    folder = tmp_path_factory.mktemp("song")
    settings = resolve_settings("smoke")
    weights = build_model("unet", settings).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "model.json").write_text(
        json.dumps(dict(model="unet", target="piano", settings=settings.model_dump(mode="json")))
    )
    soundfile.write(
        folder / "song.wav", 0.1 * np.random.default_rng(0).standard_normal(30 * 60 * 16000), 16000
    )
    return folder / "song.wav", folder


def separating(song_and_model, out: Path) -> subprocess.Popen:
    """A separation that has begun to write."""
    (song, model), before = song_and_model, set(out.iterdir())
    arguments = ["separate", str(song), "--model", str(model), "--out", str(out)]
    process = subprocess.Popen(
        [*MSS_UTILS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    until = time.monotonic() + 60
    while not [part for part in out.glob(".part-*/target.wav") if part.parent not in before]:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_says_so_and_leaves_nothing(sent, song_and_model, tmp_path, count):
    process = separating(song_and_model, tmp_path)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert (
        said.splitlines()[-1]
        == "mss_utils separate: stopped; what is finished stays, and the same command goes on."
    )
    assert not list(tmp_path.iterdir())
    count("requests to stop")


def test_what_a_killed_separation_left_goes_with_the_next(song_and_model, tmp_path, count):
    process = separating(song_and_model, tmp_path)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(".part-*"))
    second = separating(song_and_model, tmp_path)
    left = list(tmp_path.glob(".part-*"))
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert len(left) == 1 and not list(tmp_path.iterdir())
    count("kills")


def test_two_runs_at_once_are_one_after_the_other(tmp_path, monkeypatch, capfd, count):
    """The second waits for the first, then finds everything done."""
    run = little_run(tmp_path, monkeypatch)
    inside, finish = threading.Event(), threading.Event()
    stages = pipeline._run_stages

    def slow(run):
        stages(run)
        inside.set()
        finish.wait()

    monkeypatch.setattr(pipeline, "_run_stages", slow)
    first = threading.Thread(target=pipeline.run_pipeline, args=(run,))
    first.start()
    assert inside.wait(60)
    monkeypatch.setattr(pipeline, "_run_stages", stages)
    second = threading.Thread(target=pipeline.run_pipeline, args=(run,))
    second.start()
    until = time.monotonic() + 60
    while "Another process is working in" not in capfd.readouterr().err:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert second.is_alive()
    finish.set()
    first.join(60)
    second.join(60)
    assert not (first.is_alive() or second.is_alive())
    assert (run.folder / "one.txt").read_text() == "ran "
    count("runs at once", 2)
