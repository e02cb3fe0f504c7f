"""Killed at any moment, a run goes on with the same command and ends with the very tables of one that nobody disturbed."""

import json
import os
import random
import shutil
import subprocess
import time

import pandas as pd
import psutil
from conftest import MSS_UTILS, command

from mss_utils.pipeline import STAGES
from mss_utils.settings import ROOT

LONGEST_S = 25.0  # a run lives between one second and this before it is killed
CLOCKS = {"train_s", "audio_s_per_s", "inference_rtf", "peak_memory_mb"}  # what never comes out the same


def killed_after(seconds: float, whole_family: bool, arguments: list[str], environment: dict) -> bool:
    """Start the command and kill it, alone or with its kernel and workers; False if it had finished before."""
    process = subprocess.Popen([*MSS_UTILS, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ | environment)
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
    found = {path.relative_to(folder): pd.read_csv(path).drop(columns=CLOCKS, errors="ignore").to_csv() for path in tables}
    found |= {path.relative_to(folder): path.read_bytes() for path in folder.rglob("model.safetensors")}
    return found | dict(data=json.loads((folder / "environment.json").read_text())["data_hash"])


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(smoke_run, tmp_path, long_form, count):
    seed = int(os.environ.get("MSS_CHANCE", time.time()))
    print(f"the same moments again: MSS_CHANCE={seed}")
    wanted, chance = findings(smoke_run[1]), random.Random(seed)
    environment = dict(MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache"))
    arguments, folder = ["run", "--profile", "smoke", "--run", "killed"], tmp_path / "results" / "killed"
    kills, of = 0, 50 if long_form else 5
    while kills < of:
        if killed_after(chance.uniform(1, LONGEST_S), chance.random() < 0.5, arguments, environment):
            kills += 1
        else:  # it got through: compared, and begun anew
            assert findings(folder) == wanted
            shutil.rmtree(tmp_path / "results")
            shutil.rmtree(tmp_path / "cache")
    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert findings(folder) == wanted
    assert not [path for path in tmp_path.rglob("*.part*")]
    again = command(*arguments, **environment)
    assert again.stdout.count("unchanged, skipped") == len(STAGES), "a finished run is not repeated"
    count("kills", kills)
