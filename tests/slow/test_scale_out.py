"""Several processes and machines, simulated on one machine: the commands of docs/scale_out.md."""

import json
import socket
import time

import pandas as pd
import pytest
import torch
from conftest import start

from mss_utils.config import load_run
from mss_utils.data import open_store
from mss_utils.evaluation import evaluate


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


def test_dask_workers_make_the_same_tables(cluster, smoke_run, monkeypatch):
    from dask.distributed import Client

    run = load_run("smoke")
    store = open_store(run.settings)
    local = evaluate(run, store)
    monkeypatch.setenv("MSS_DASK", str(cluster))
    with Client(scheduler_file=str(cluster)) as client:
        client.wait_for_workers(2, timeout=60)
        remote = evaluate(run, store)
        jobs = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert len(jobs) == 2 and sum(jobs.values()) >= len(store.split("test")), jobs
    for name in set(local) - {"cost"}:
        pd.testing.assert_frame_equal(local[name], remote[name], check_exact=True)


def first_moments(folder, n_processes):
    """Adam's first moments after one step: the clipped gradients times 0.1."""
    model = folder / "smoke" / "models" / "piano" / "demucs_attention" / "seed0"
    assert json.loads((model / "model.json").read_text())["processes"] == n_processes
    parts = torch.load(model / "last.ckpt", weights_only=True)["parts"]
    return [value["exp_avg"] for value in parts["optimizer"]["state"].values()]


def test_two_processes_have_the_gradients_of_one(small_settings, tmp_path):
    """The setting `devices`, and torchrun on two machines."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", address, "-m", "--"]
    train = ["mss_utils", "train", "--profile", "smoke", "--data", small_settings.data]
    train += ["--target", "piano", "--model", "demucs_attention", "--set", "device=cpu"]
    train += ["segment_s=0.5", "valid_s=2", "steps=1", "valid_every=1", "batch_size=4"]
    lines = {"alone": train, "devices": [*train, "devices=2"], "machines": [*torchrun, *train]}
    names = [*lines, "machines"]  # twice
    for process in [start(*lines[name], MSS_RESULTS=str(tmp_path / name)) for name in names]:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
    alone = first_moments(tmp_path / "alone", 1)
    largest = max(tensor.abs().max().item() for tensor in alone)
    for name in ("devices", "machines"):
        moments = first_moments(tmp_path / name, 2)
        torch.testing.assert_close(moments, alone, rtol=1e-3, atol=1e-5 * largest)
