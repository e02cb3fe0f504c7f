"""Several processes and machines, simulated on one machine: the commands of docs/scale_out.md."""

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
from mss_utils.evaluation import evaluate
from mss_utils.separation import write_estimates
from mss_utils.training import train


def start(*command, **environment):
    """`python -m ...` in the background."""
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
    """Scheduler file of a Dask scheduler with two workers."""
    file = tmp_path / "scheduler.json"
    options = ["--scheduler-file", str(file), "--no-dashboard"]
    processes = [start("dask", "scheduler", *options, "--port", "0")]
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline and processes[0].poll() is None, "no scheduler"
        time.sleep(0.1)
    for n in range(2):
        folder = ["--local-directory", str(tmp_path / str(n))]
        processes.append(start("dask", "worker", *options, "--nthreads", "1", *folder))
    yield file
    for process in reversed(processes):
        process.terminate()
        process.wait()


def test_dask_workers_make_the_same_tables(cluster, small_settings, tmp_path, monkeypatch):
    from dask.distributed import Client

    monkeypatch.setenv("MSS_RESULTS", str(tmp_path / "results"))
    run = create_or_load_run("smoke", "small", small_settings.data, "piano", f"{SMALL} ablations=")
    store = open_store(run.settings)
    for model in MODELS:
        train(run, store, "piano", model)
    write_estimates(run, store)
    local = evaluate(run, store)
    monkeypatch.setenv("MSS_DASK", str(cluster))
    with Client(scheduler_file=str(cluster)) as client:
        client.wait_for_workers(2, timeout=60)
        remote = evaluate(run, store)
        jobs = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert len(jobs) == 2 and sum(jobs.values()) >= len(store.split("test")), jobs
    for name in set(local) - {"cost"}:
        pd.testing.assert_frame_equal(local[name], remote[name], check_exact=True)


def test_torchrun_on_two_machines_trains_one_model(small_settings, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    line = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    line += ["-m", "--", "mss_utils", "train", "--profile", "smoke", "--run", "two"]
    line += ["--data", small_settings.data, "--target", "piano", "--set", *SMALL.split()]
    machines = [start(*line, MSS_RESULTS=str(tmp_path)) for _ in range(2)]
    for machine in machines:
        _, error = machine.communicate(timeout=300)
        assert machine.returncode == 0, error[-3000:]
    for model in MODELS:
        path = tmp_path / "two" / "models" / "piano" / model / "seed0" / "model.json"
        description = json.loads(path.read_text())
        assert description["processes"] == 2 and description["steps"] == 6
