"""Training in several processes of torchrun, one per device, that share every batch."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pandas as pd
from lightning_fabric import Fabric

from mss_utils.config import ROOT, Run, Settings


def create_fabric(settings: Settings) -> Fabric:
    """Set up Lightning Fabric for this process, alone or as one of the processes of torchrun."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if settings.batch_size % processes:
        size = settings.batch_size
        raise ValueError(f"batch_size={size} is no multiple of the {processes} processes.")
    options: Any = dict(accelerator=settings.device, precision=settings.precision)
    fabric = Fabric(devices=devices, num_nodes=processes // devices, **options)
    fabric.launch()
    return fabric


def train_in_processes(run: Run, target: str, model_name: str, seed: int, on_validation) -> None:
    """Run `python -m mss_utils train` under torchrun, one process per device; see `train`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={run.settings.devices}", "-m", "--", "mss_utils", "train"]
    command += ["--profile", run.settings.profile, "--run", run.name]
    command += ["--stem", target, "--model", model_name, "--seed", str(seed)]
    run.write_settings()
    history, shown = run.model_folder(target, model_name, seed) / "history.csv", 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2)
                if on_validation and history.exists() and history.stat().st_mtime_ns != shown:
                    shown = history.stat().st_mtime_ns
                    on_validation(pd.read_csv(history))
        finally:
            process.terminate()  # an interrupted notebook leaves no training running
    if process.returncode:
        raise ChildProcessError(f"Training {model_name} failed; see the output above.")
