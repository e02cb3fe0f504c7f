"""Monitoring a training: progress bar, clock, NaN check, collapse warning."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from tqdm.auto import tqdm

from mss_utils.config import Settings
from mss_utils.mixing import Batch

LOG_INTERVAL_S = 10.0  # reading the loss makes a GPU finish all steps before it
SAVE_INTERVAL_S = 300.0  # a killed training loses at most this much work
COLLAPSE_DB = -25.0  # an estimate this close to the mixture or to silence is a collapse


class TrainingMonitor(AbstractContextManager):
    """Monitor a training every few seconds: progress bar, NaN check, collapse warning.

    Losses stay on the device until the next check. `state` receives the losses since the last
    validation, and the training time in seconds, without validation and saving.
    """

    def __init__(self, fabric: Fabric, settings: Settings, identity: dict, state: dict):
        self.settings, self.name, self.state = settings, identity["model"], state
        self.is_main_process = fabric.is_global_zero
        self.losses, self.warned = [], set()
        options: Any = dict(unit="step", mininterval=1, disable=not self.is_main_process)
        title = f"{self.name} on {identity['target']}"
        self.bar = tqdm(total=settings.steps, initial=state["step"], desc=title, **options)
        self.clock = self.last_save = time.perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the bar; name the settings to change if the memory ran out."""
        self.bar.close()
        on_cpu = isinstance(error, RuntimeError) and "not enough memory" in str(error)
        if on_cpu or isinstance(error, torch.OutOfMemoryError):
            size, seconds = self.settings.batch_size, self.settings.segment_s
            raise MemoryError(
                f"{self.name} ran out of memory: lower batch_size={size} or segment_s={seconds:g}, "
                "or set precision=bf16-mixed."
            ) from error

    def step(self, loss: torch.Tensor, network: torch.nn.Module, batch: Batch, check: bool) -> None:
        """Count a step; check the losses if `check` is set or the last check is too long ago."""
        self.losses.append(loss)
        self.bar.update()
        if not check and time.perf_counter() - self.clock <= LOG_INTERVAL_S:
            return
        state, losses = self.state, torch.stack(self.losses).tolist()
        for step, value in enumerate(losses, state["step"] - len(losses)):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss of {self.name} is {value} at step {step}: "
                    "lower its learning rate (unet_lr, demucs_lr) or raise warmup_steps."
                )
        if self.is_main_process and state["step"] > self.settings.warmup_steps:
            self._warn_of_collapse(network, Batch(*(x[:4] for x in vars(batch).values())))
        self.losses = []
        state["losses"] += losses
        state["train_s"] += time.perf_counter() - self.clock
        audio_s = state["step"] * self.settings.batch_size * self.settings.segment_s
        speed = f"{audio_s / state['train_s']:.0f} s/s"
        self.bar.set_postfix(loss=f"{sum(losses) / len(losses):.2f}", audio=speed)
        self.clock = time.perf_counter()

    def save_is_due(self) -> bool:
        """Return whether the last checkpoint is old; never between two checks."""
        return not self.losses and self.clock - self.last_save > SAVE_INTERVAL_S

    def saved(self) -> None:
        """Restart the clock after validation and saving, which are not training time."""
        self.clock = self.last_save = time.perf_counter()

    def _warn_of_collapse(self, network: torch.nn.Module, batch: Batch) -> None:
        output = collapsed_output(network, batch)
        if output and output not in self.warned:
            self.warned.add(output)
            warnings.warn(
                f"At step {self.state['step']}, {self.name} returns {output} for every example. "
                "If that lasts, lower its learning rate, raise warmup_steps or use another seed.",
                stacklevel=3,
            )


@torch.inference_mode()
def collapsed_output(network: torch.nn.Module, batch: Batch) -> str | None:
    """Return "the mixture" or "silence" if the network returns only that, and it is wrong."""
    network.eval()
    estimate = network(batch.mixture)
    network.train()
    for name, output in {"the mixture": batch.mixture, "silence": 0 * batch.mixture}.items():
        signals = (batch.mixture, batch.target - output, estimate - output)
        mixture, error, distance = (x.square().mean(dim=(1, 2)) + 1e-12 for x in signals)
        is_wrong = 10 * torch.log10(error / mixture) > COLLAPSE_DB / 2
        is_output = 10 * torch.log10(distance / mixture) < COLLAPSE_DB
        if is_wrong.any() and is_output[is_wrong].all():
            return name
    return None
