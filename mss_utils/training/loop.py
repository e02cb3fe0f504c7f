"""The training loop: visible and short; Lightning Fabric carries device, precision and several processes.

    Recipe (network, objective, step size) + Mixer (batches) --fit--> weights, history.csv, last.ckpt --train--> model.json

Taught in notebooks 02 to 04.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from tqdm.auto import tqdm

from mss_utils.config import ROOT, Run, Settings, results_folder
from mss_utils.data import Store
from mss_utils.environment import check_device, peak_memory_mb, reset_peak_memory
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.files import file_lock, write_text
from mss_utils.mixing import Batch, Mixer
from mss_utils.models import build_model, count_parameters, load_model
from mss_utils.separation import separate
from mss_utils.training.checkpoints import is_trained, keep_best, resume, save_checkpoint

LEARNING_RATES = dict(unet="unet_lr", demucs_lstm="demucs_lr", demucs_attention="demucs_lr")
LOOK_EVERY_S = 10.0  # how often the loss is read and the network looked at: on a GPU, reading it waits for all steps before
SAVE_EVERY_S = 300.0  # how much work a killed training loses at the most
COLLAPSE_DB = -25.0  # an estimate nearer than this to the mixture, or to silence, is no separation


@dataclass(frozen=True)
class Recipe:
    """What a training has of its own; everything else is the same for all models."""

    network: torch.nn.Module  # mixture (batch, channels, samples) -> estimate of the same shape
    objective: Callable[[torch.nn.Module, Batch], torch.Tensor]  # loss of the network on a batch
    lr: float  # at its peak
    weight_decay: float
    grad_clip: float  # largest norm of the gradients


def build_recipe(model_name: str, settings: Settings, seed: int = 0) -> Recipe:
    """The recipe of `unet`, `demucs_lstm` or `demucs_attention`."""
    lr = getattr(settings, LEARNING_RATES[model_name])
    return Recipe(
        build_model(model_name, settings, seed),
        separation_loss,
        lr,
        settings.weight_decay,
        settings.grad_clip,
    )


def separation_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """`snr_loss` of the target that `model` finds in the mixture of a batch."""
    return snr_loss(model(batch.mixture), batch.target, batch.mixture)


def reconstruction_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """`snr_loss` of a network that is to return the mixture itself, see `reconstruction_check`."""
    return snr_loss(model(batch.mixture), batch.mixture, batch.mixture)


def snr_loss(
    estimate: torch.Tensor, target: torch.Tensor, mixture: torch.Tensor, floor_db: float = -30.0
) -> torch.Tensor:
    """Negative signal-to-noise ratio in dB, averaged over the examples of `(batch, channels, samples)`.

    Every example counts alike whatever its level. Error and target are measured above a floor of `floor_db` below the
    mixture, so that silent targets have a finite loss that asks for silence.
    """
    energy = lambda x: x.square().mean(dim=(1, 2))
    floor = energy(mixture) * 10 ** (floor_db / 10) + 1e-8
    ratio = (energy(estimate - target) + floor) / (energy(target) + floor)
    return 10 * torch.log10(ratio).mean()


def learning_rate(step: int, settings: Settings, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a hundredth of it at the last step."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


# --- one model of a run -------------------------------------------------------------------------------------------------


def train(
    run: Run,
    store: Store,
    target: str,
    model_name: str,
    seed: int = 0,
    on_validation: Callable | None = None,
) -> torch.nn.Module:
    """Train one model, or load it when the run already holds one that fits settings and data; in evaluation mode.

    Writes model.safetensors (the weights with the best validation score), history.csv, last.ckpt, from which the same
    call goes on after an interruption, and in the end model.json. Of several calls for the same model one
    trains it and the others wait (not so under `torchrun`). `on_validation(history)` gets a DataFrame after each
    validation. With `devices` above 1 the training runs in that many processes, as `torchrun` would start them. Raises
    FloatingPointError when the loss is no longer finite, MemoryError with what to try when a batch does not fit,
    ValueError when validation would hear no target or the batch cannot be shared out.
    """
    folder, identity = (
        run.model_folder(target, model_name, seed),
        training_identity(run.settings, store, target, model_name, seed),
    )
    if run.settings.devices > 1 and not is_trained(folder, identity):
        check_device(run.settings)
        with file_lock(folder):
            _train_in_processes(run, target, model_name, seed, on_validation)
    train_in_this_process(run, store, target, model_name, seed, on_validation)
    return load_model(folder)


def train_in_this_process(
    run: Run,
    store: Store,
    target: str,
    model_name: str,
    seed: int = 0,
    on_validation: Callable | None = None,
) -> None:
    """Train one model, if it is not trained yet, in this process: alone, or as one of those that `torchrun` started; see `train`."""
    folder, identity = (
        run.model_folder(target, model_name, seed),
        training_identity(run.settings, store, target, model_name, seed),
    )
    if is_trained(folder, identity):
        return
    _check_validation(store, run.settings, target)
    check_device(run.settings)
    recipe = build_recipe(model_name, run.settings, seed)
    if run.settings.start_from:
        start(recipe.network, run.settings, target, model_name, seed)
    run.write_settings()  # not before what they ask for has shown to be possible: from now on they hold
    with nullcontext() if "WORLD_SIZE" in os.environ else file_lock(folder):
        if is_trained(folder, identity):  # by whom this process has waited for
            return
        reset_peak_memory(run.settings)
        state = fit(run.settings, store, identity, folder, recipe, on_validation)
        if int(os.environ.get("RANK", 0)) == 0:  # one process writes
            write_text(
                folder / "model.json",
                json.dumps(identity | _outcome(run.settings, model_name, state), indent=2) + "\n",
            )


def _outcome(settings: Settings, model_name: str, state: dict) -> dict:
    """What model.json says of a training beside its identity."""
    return dict(
        parameters=count_parameters(build_model(model_name, settings)),
        steps=state["step"],
        best_step=state["best_step"],
        best_weights=state["best_weights"],
        valid_sdr=state["best"],
        train_s=state["train_s"],
        peak_memory_mb=peak_memory_mb(settings),
        processes=int(os.environ.get("WORLD_SIZE", 1)),
    )


def training_identity(
    settings: Settings, store: Store, target: str, model_name: str, seed: int
) -> dict:
    """What a training is of: everything that its weights depend on, and where it came from."""
    return dict(
        model=model_name,
        target=target,
        seed=seed,
        data=store.sha,
        settings=settings.model_dump(mode="json"),
    )


def start(
    network: torch.nn.Module, settings: Settings, target: str, model_name: str, seed: int
) -> None:
    """Give `network` the weights that the run `start_from` has for the same model; ValueError where that is of another rate or size."""
    folder = Run(
        settings.start_from, settings, results_folder() / settings.start_from
    ).model_folder(target, model_name, seed)
    first = load_model(folder)
    if first.sample_rate != settings.sample_rate:
        raise ValueError(
            f"{folder} has learnt from audio at {first.sample_rate} Hz, this run has {settings.sample_rate}: start from one of the same rate."
        )
    try:
        network.load_state_dict(first.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{folder} cannot be started from ({reason}): it needs the same channels, n_fft and sizes of the models."
        ) from None


# --- the loop -----------------------------------------------------------------------------------------------------------


def fit(
    settings: Settings,
    store: Store,
    identity: dict,
    folder: Path,
    recipe: Recipe,
    on_validation: Callable | None = None,
) -> dict:
    """The loop: draw, forward, backward, step, average; validate and save now and then. Returns the final state.

    `identity` says what is trained (model, target, seed, data, settings): the checkpoint in `folder` is gone on from if
    it is of the same. The state holds step, train_s, best (validation SDR in dB), best_step, best_weights and history.
    """
    fabric = _fabric(settings)
    model, optimizer = setup_optimizer(fabric, recipe)
    average = copy_network(recipe.network)
    networks = {"raw": recipe.network, "ema": average}
    state = resume(folder, networks, optimizer, identity)
    mixer = Mixer(store, settings, identity["target"], identity["seed"])
    share = fabric.global_rank, fabric.world_size  # of every batch, for this process

    with TrainingMonitor(fabric, settings, identity, state) as watch:
        for batch in mixer.batches(state["step"], settings.steps, fabric.device, share):
            rate = learning_rate(state["step"], settings, recipe.lr)
            loss = train_step(fabric, model, optimizer, recipe, batch, rate)
            update_ema(average, recipe.network, settings.ema_decay)
            state["step"] += 1
            validating = (
                state["step"] % settings.valid_every == 0 or state["step"] == settings.steps
            )
            watch.step(loss, recipe.network, batch, look=validating)
            if validating and fabric.is_global_zero:  # the other processes wait at their next step
                scores = {
                    weights: validate(network, store, settings, identity["target"])
                    for weights, network in networks.items()
                }
                _record(state, settings, scores, rate)
                keep_best(folder, networks, state)
            if (validating or watch.save_is_due()) and fabric.is_global_zero:
                save_checkpoint(folder, networks, optimizer, state, identity)
                if validating and on_validation:
                    on_validation(pd.DataFrame(state["history"]))
                watch.saved()
    return state


def train_step(
    fabric: Fabric, model: torch.nn.Module, optimizer, recipe: Recipe, batch: Batch, rate: float
) -> torch.Tensor:
    """One step downhill: forward, loss, backward, clip, update. Returns the loss, which stays on the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = recipe.objective(model, batch)
    fabric.backward(loss)
    # Whether the norm is finite is not asked: the answer would have to wait for the GPU.
    fabric.clip_gradients(model, optimizer, max_norm=recipe.grad_clip, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def setup_optimizer(fabric: Fabric, recipe: Recipe) -> tuple:
    """The network and the optimizer of a recipe as `fabric` wraps them; the network is moved to the device of `fabric`."""
    network = recipe.network
    if (
        fabric.world_size > 1 and fabric.device.type == "cuda"
    ):  # statistics of the whole batch, not of one share
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    adam = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return fabric.setup(network, adam)


def copy_network(network: torch.nn.Module) -> torch.nn.Module:
    """A second network with the same weights, for their average, see `follow`."""
    average = deepcopy(network)
    for layer in average.modules():
        if isinstance(layer, torch.nn.RNNBase):
            layer.flatten_parameters()  # a copy's weights do not lie side by side, as a GPU wants them
    return average


@torch.no_grad()
def update_ema(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """One step of the exponential moving average (EMA) of weights and running statistics: `average` nears `network` by 1 - decay.

    torch's own AveragedModel would make a GPU wait at every step.
    """
    pairs = [
        pair
        for pair in zip(average.state_dict().values(), network.state_dict().values())
        if pair[0].is_floating_point()
    ]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)


class TrainingMonitor:
    """Looks after a training every few seconds: progress bar, clock, losses that are not finite, a network that gave up.

    Losses stay on the device until the next look. `state` gets what was seen: the losses since the last validation, and
    the seconds of training, in which validation and saving do not count.
    """

    def __init__(self, fabric: Fabric, settings: Settings, identity: dict, state: dict):
        self.settings, self.name, self.state, self.losses, self.warned = (
            settings,
            identity["model"],
            state,
            [],
            set(),
        )
        self.speaks = fabric.is_global_zero  # for all processes
        self.bar = tqdm(
            total=settings.steps,
            initial=state["step"],
            desc=f"{self.name} on {identity['target']}",
            unit="step",
            mininterval=1,
            disable=not self.speaks,
        )
        self.clock = self.last_save = time.perf_counter()

    def __enter__(self) -> TrainingMonitor:
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        """Close the bar; running out of memory is said in terms of settings. Torch has its own error for GPUs only."""
        self.bar.close()
        if isinstance(error, torch.OutOfMemoryError) or (
            kind is RuntimeError and "not enough memory" in str(error)
        ):
            size, seconds = self.settings.batch_size, self.settings.segment_s
            smaller = f"batch_size={size // 2}, or " if size > 1 else ""
            raise MemoryError(
                f"{self.name} ran out of memory with batch_size={size} and segment_s={seconds:g}: "
                f"set {smaller}segment_s={seconds / 2:g}, or precision=bf16-mixed."
            ) from error

    def step(self, loss: torch.Tensor, network: torch.nn.Module, batch: Batch, look: bool) -> None:
        """Count a step; look if it is time to, or if `look` says so. Raises FloatingPointError for a loss that is not finite."""
        self.losses.append(loss)
        self.bar.update()
        if look or time.perf_counter() - self.clock > LOOK_EVERY_S:
            losses, self.losses = (
                torch.stack(self.losses).tolist(),
                [],
            )  # on a GPU this waits for all steps before
            self._check_finite(losses)
            if self.speaks:
                self._warn_of_collapse(network, batch)
            self.state["losses"] += losses
            self.state["train_s"] += time.perf_counter() - self.clock
            self._show(np.mean(losses))
            self.clock = time.perf_counter()

    def save_is_due(self) -> bool:
        """Whether more has been learnt since the last checkpoint than one would like to lose."""
        return not self.losses and self.clock - self.last_save > SAVE_EVERY_S

    def saved(self) -> None:
        """Go on counting time: that of validation and saving is not training time."""
        self.clock = self.last_save = time.perf_counter()

    def _check_finite(self, losses: list[float]) -> None:
        for step, loss in enumerate(losses, self.state["step"] - len(losses)):
            if not math.isfinite(loss):
                setting = LEARNING_RATES.get(self.name, "its learning rate")
                raise FloatingPointError(
                    f"The loss of {self.name} is {loss} at step {step}: set {setting} lower, or warmup_steps higher."
                )

    def _warn_of_collapse(self, network: torch.nn.Module, batch: Batch) -> None:
        """Say once when all that the network has learnt is to hand back the mixture, or nothing."""
        few = Batch(*(audio[:4] for audio in vars(batch).values()))
        answer = collapse(network, few) if self.state["step"] > self.settings.warmup_steps else None
        if answer and answer not in self.warned:
            self.warned.add(answer)
            warnings.warn(
                f"At step {self.state['step']}, {self.name} returns {answer} for every example looked at. If that lasts, "
                "set its learning rate lower, warmup_steps higher, or begin with another seed.",
                stacklevel=3,
            )

    def _show(self, loss: float) -> None:
        speed = (
            self.state["step"]
            * self.settings.batch_size
            * self.settings.segment_s
            / self.state["train_s"]
        )
        scores = (
            {"SDR": f"{self.state['history'][-1]['valid_sdr_db']:.2f} dB"}
            if self.state["history"]
            else {}
        )
        self.bar.set_postfix({"loss": f"{loss:.2f}"} | scores | {"audio": f"{speed:.0f} s/s"})


@torch.inference_mode()
def collapse(network: torch.nn.Module, batch: Batch) -> str | None:
    """'the mixture' or 'silence' if that is what `network` returns for every example in which it would be wrong, else None."""
    network.eval()
    estimate = network(batch.mixture)
    network.train()
    level_db = lambda x: (
        10
        * torch.log10(
            x.square().mean(dim=(1, 2)) / (batch.mixture.square().mean(dim=(1, 2)) + 1e-12) + 1e-12
        )
    )
    for answer, distance, truth in (
        ("the mixture", estimate - batch.mixture, batch.target - batch.mixture),
        ("silence", estimate, batch.target),
    ):
        wrong = level_db(truth) > COLLAPSE_DB / 2
        if wrong.any() and (level_db(distance)[wrong] < COLLAPSE_DB).all():
            return answer
    return None


def _fabric(settings: Settings) -> Fabric:
    """One process, or one of those that `torchrun` started; every process takes an equal share of each batch."""
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % processes:
        size = settings.batch_size
        raise ValueError(
            f"{processes} processes cannot share batch_size={size} equally: set it to a multiple of {processes}."
        )
    fabric = Fabric(
        accelerator=settings.device,
        devices=devices,
        num_nodes=processes // devices,
        precision=settings.precision,
    )
    fabric.launch()
    return fabric


def _train_in_processes(
    run: Run, target: str, model_name: str, seed: int, on_validation: Callable | None
) -> None:
    """Have `torchrun` start one process a device on this machine; follow their history from here."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={run.settings.devices}",
    ]
    command += [
        "-m",
        "--",
        "mss_utils",
        "train",
        "--profile",
        run.settings.profile,
        "--run",
        run.name,
    ]
    command += ["--stem", target, "--model", model_name, "--seed", str(seed)]
    run.write_settings()
    path, shown = run.model_folder(target, model_name, seed) / "history.csv", 0
    with subprocess.Popen(command, cwd=ROOT) as processes:
        try:
            while processes.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    processes.wait(timeout=2)
                if on_validation and path.exists() and path.stat().st_mtime_ns != shown:
                    shown = path.stat().st_mtime_ns
                    on_validation(pd.read_csv(path))
        finally:
            processes.terminate()  # an interrupted notebook leaves no training behind
    if processes.returncode:
        raise ChildProcessError(
            f"Training {model_name} in {run.settings.devices} processes failed; what they printed above says why."
        )


def _record(state: dict, settings: Settings, scores: dict[str, float], lr: float) -> None:
    """Add a row to the history: the mean loss since the last one, and the validation score of each set of weights."""
    audio_s = state["step"] * settings.batch_size * settings.segment_s
    state["history"].append(
        dict(
            step=state["step"],
            train_loss_db=float(np.mean(state["losses"])),
            valid_sdr_db=max(scores.values()),
            raw_sdr_db=scores["raw"],
            ema_sdr_db=scores["ema"],
            lr=lr,
            train_s=state["train_s"],
            audio_s_per_s=audio_s / state["train_s"],
        )
    )
    state["losses"] = []


def reconstruction_check(
    model_name: str, store: Store, settings: Settings, n_steps: int = 300, every: int = 25
) -> pd.DataFrame:
    """Can the network pass a signal through? Train it with the mixture itself as target; SDR in dB on an unseen song.

    Returns columns step, sdr_db: one row each `every` steps, scored on up to 10 s of the first validation track.
    """
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    peak_lr = 4e-3  # copying is easy: twice the step of a separation, and it is done sooner
    recipe = replace(build_recipe(model_name, settings), objective=reconstruction_loss, lr=peak_lr)
    network, (model, optimizer) = recipe.network, setup_optimizer(fabric, recipe)
    mixer, unseen = Mixer(store, settings, store.stems[0]), store.split("valid")[0]
    mixture, _ = store.load(unseen, 0, min(unseen.samples, 10 * store.sample_rate))
    network.segment_s, rows = settings.segment_s, []
    batches = mixer.batches(settings.stage3_step, settings.stage3_step + n_steps, fabric.device)
    for step, batch in enumerate(
        tqdm(batches, total=n_steps, desc=f"{model_name} reconstructs", unit="step", mininterval=1),
        1,
    ):
        rate = peak_lr * min(1.0, 2 * (1 - step / (n_steps + 1)))
        train_step(fabric, model, optimizer, recipe, batch, rate)
        if step % every == 0 or step == n_steps:
            rows.append(
                dict(
                    step=step,
                    sdr_db=utterance_sdr(
                        mixture.T, separate(network, mixture, store.sample_rate).T
                    ),
                )
            )
    return pd.DataFrame(rows)


def validate(model: torch.nn.Module, store: Store, settings: Settings, target: str) -> float:
    """Median utterance SDR in dB over the validation tracks, `valid_s` seconds from the middle of each."""
    model.segment_s = settings.segment_s
    row, scores = store.stem_index(target), []
    for mixture, stems in _validation_excerpts(store, settings):
        scores.append(utterance_sdr(stems[row].T, separate(model, mixture, store.sample_rate).T))
    return float(np.nanmedian(scores))


def _validation_excerpts(
    store: Store, settings: Settings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mixture `(channels, samples)` and stems `(stems, channels, samples)` of the middle of each validation track."""
    for track in store.split("valid"):
        length = min(track.samples, round(settings.valid_s * store.sample_rate))
        yield store.load(track, (track.samples - length) // 2, length)


def _check_validation(store: Store, settings: Settings, target: str) -> None:
    """A silent reference has no score: without any other, nothing could choose the weights. Better said now than in hours."""
    row = store.stem_index(target)
    if not any(stems[row].any() for _, stems in _validation_excerpts(store, settings)):
        raise ValueError(
            f"{target} is silent in the middle {settings.valid_s:g} s of every validation track, so no training could be scored: "
            "set valid_s higher, or choose other validation tracks."
        )


def load_history(folder: Path) -> pd.DataFrame:
    """One row per validation: step, train_loss_db, valid_sdr_db (the better of the two that follow), raw_sdr_db, ema_sdr_db,
    lr, train_s, audio_s_per_s.
    """
    return pd.read_csv(folder / "history.csv")
