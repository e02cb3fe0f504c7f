"""Several processes and several machines, as far as one machine can play them: the commands of docs/scale-out.md, and the same tables."""

import json
import os
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import SMALL

from mss_utils.config import MODELS, ROOT, create_or_load_run
from mss_utils.data import open_store
from mss_utils.evaluation.scores import evaluate
from mss_utils.training.loop import train


def started(*command, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers, each a process; gives the scheduler file."""
    file = tmp_path / "scheduler.json"
    place = ["--scheduler-file", str(file)]
    dask = [started("dask", "scheduler", *place, "--port", "0", "--no-dashboard")]
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until and dask[0].poll() is None, "no scheduler"
        time.sleep(0.1)
    dask += [
        started(
            "dask",
            "worker",
            *place,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--local-directory",
            str(tmp_path / str(n)),
        )
        for n in range(2)
    ]
    yield file
    for process in reversed(dask):
        process.terminate()
        process.wait()


def test_two_dask_workers_make_the_same_tables(
    cluster, small_settings, tmp_path, monkeypatch, count
):
    from dask.distributed import Client

    monkeypatch.setenv("MSS_RESULTS", str(tmp_path / "results"))
    run = create_or_load_run("smoke", "small", small_settings.data, "piano", f"{SMALL} ablations=")
    store = open_store(run.settings)
    for model in MODELS:
        train(run, store, "piano", model)
    alone = evaluate(run, store)
    monkeypatch.setenv("MSS_DASK", str(cluster))
    with Client(scheduler_file=str(cluster)) as client:
        client.wait_for_workers(2, timeout=60)
        together = evaluate(run, store)
        done = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert len(done) == 2 and sum(done.values()) >= len(store.split("test")), (
        f"scored by the workers: {done}"
    )
    for name in set(alone) - {"cost"}:
        pd.testing.assert_frame_equal(alone[name], together[name], check_exact=True)
    count("Dask workers", 2)


def test_a_cluster_that_is_not_there_is_said(small_settings, store, monkeypatch, tmp_path):
    from mss_utils.evaluation.scores import _workers

    monkeypatch.setenv("MSS_DASK", str(tmp_path / "none.json"))
    with (
        pytest.raises(
            FileNotFoundError,
            match="MSS_DASK names no scheduler file .*dask scheduler --scheduler-file",
        ),
        _workers(),
    ):
        pass


def test_two_machines_of_one_process_each_train_one_model(
    small_settings, tmp_path, long_form, count
):
    """The line for several machines, given twice on this one."""
    if not long_form:
        pytest.skip(
            "in the long form only (tests/test_training.py has two processes of one machine): pytest --long"
        )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    line = [
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "-m",
        "--",
    ]
    line += [
        "mss_utils",
        "train",
        "--profile",
        "smoke",
        "--run",
        "two",
        "--data",
        small_settings.data,
        "--target",
        "piano",
        "--set",
        *SMALL.split(),
    ]
    machines = [started(*line, MSS_RESULTS=str(tmp_path)) for _ in range(2)]
    for machine in machines:
        _, error = machine.communicate(timeout=300)
        assert machine.returncode == 0, error[-3000:]
    for model in MODELS:
        described = json.loads(
            (tmp_path / "two" / "models" / "piano" / model / "seed0" / "model.json").read_text()
        )
        assert described["processes"] == 2 and described["steps"] == 6
    count("machines played", 2)
