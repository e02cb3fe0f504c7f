"""A full and a read-only disk at every stage: one clear error, earlier results as they were, and on it goes once there is room."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = (
    "songs",
    "store",
    "training",
    "environment",
    "figure",
    "evaluation",
    "excerpts",
    "separate",
    "separate to flac",
    "notebook",
    "report",
    "export",
)
FAULTS = {
    "full": "No room left to write",
    "nearly full": "No room left to write",
    "read-only": "cannot be written",
}


def own_namespace() -> list[str]:
    """What a command is put behind so that it may mount; skips where neither root nor a user's namespace may."""
    prefix = ["unshare", "--mount", "--map-root-user"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
    ):
        pytest.skip("this machine does not let tests mount a disk of their own")
    return prefix


@pytest.fixture(scope="module")
def tried(dataset, smoke_run, tmp_path_factory):
    """What small_disk.py has found: (stage, fault) -> what is told of it."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "disk").mkdir()
    script, tests = Path(__file__).with_name("small_disk.py"), Path(__file__).parents[1]
    environment = os.environ | dict(
        LITTLE=str(folder / "little"),
        PYTHONPATH=os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]),
    )
    command = [
        *own_namespace(),
        sys.executable,
        str(script),
        str(folder / "disk"),
        str(dataset),
        str(smoke_run[1]),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tests.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    return {(row["stage"], row["fault"]): row for row in rows}


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_refuses_is_one_sentence_and_costs_nothing(tried, stage, count):
    for fault, words in FAULTS.items():
        found = tried[stage, fault]
        assert not found["changed"] and not found["left"], found
        if fault == "nearly full" and not found["error"]:  # what a stage writes may be little
            continue
        assert (
            words in found["error"]
            and "\n" not in found["error"]
            and "the same command goes on" in found["error"]
        ), found
        assert found["kind"] == "OSError", found
    assert tried[stage, "none"]["written"], "with room it goes on"
    count("disk faults", len(FAULTS))
