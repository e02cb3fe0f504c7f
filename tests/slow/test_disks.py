"""A full and a read-only disk at every stage: one clear error, earlier results unchanged."""

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
    "estimates",
    "evaluation",
    "separate",
    "export",
)
ERRORS = {"full": "No space left to write", "read-only": "Cannot write"}


def own_namespace():
    """Command prefix that allows mounting; skips where the system forbids it."""
    prefix = ["unshare", "--mount", "--map-root-user"]
    mount = [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow tests to mount a disk")
    return prefix


@pytest.fixture(scope="module")
def outcomes(dataset, smoke_run, tmp_path_factory):
    """(stage, fault) -> row printed by small_disk.py."""
    disk = tmp_path_factory.mktemp("disk")
    script, tests = Path(__file__).with_name("small_disk.py"), Path(__file__).parents[1]
    python_path = os.pathsep.join([str(tests), str(tests.parent)])
    command = [
        *own_namespace(),
        sys.executable,
        str(script),
        str(disk),
        str(dataset),
        str(smoke_run[1]),
    ]
    folders = dict(MSS_RESULTS=str(disk / "results"), MSS_CACHE=str(disk / "cache"))
    environment = os.environ | dict(PYTHONPATH=python_path) | folders
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tests.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    return {(row["stage"], row["fault"]): row for row in rows}


@pytest.mark.parametrize("stage", STAGES)
def test_unwritable_disk_is_one_error_and_loses_nothing(outcomes, stage):
    for fault, words in ERRORS.items():
        row = outcomes[stage, fault]
        assert not row["changed"], row
        assert row["kind"] == "OSError" and words in row["error"] and "\n" not in row["error"], row
    assert outcomes[stage, "none"]["written"]
