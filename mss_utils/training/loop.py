"""The training loop of all models; Lightning Fabric handles device, precision and processes.

Recipe + Mixer --fit--> model.safetensors, history.csv, last.ckpt; at the end model.json. Taught in
notebooks 02 to 04.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from mss_utils.config import Run, Settings, results_folder
from mss_utils.data import Store
from mss_utils.environment import check_device, peak_memory_mb, reset_peak_memory
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.files import file_lock, write_text
from mss_utils.mixing import Batch, Mixer
from mss_utils.models import build_model, count_parameters, load_model
from mss_utils.separation import separate
from mss_utils.training.checkpoints import is_trained, keep_best, resume, save_checkpoint
from mss_utils.training.launcher import create_fabric, train_in_processes
from mss_utils.training.monitor import TrainingMonitor


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: network, loss, hyperparameters of the optimizer."""

    network: torch.nn.Module  # mixture (batch, channels, samples) -> estimate of the same shape
    objective: Callable[[torch.nn.Module, Batch], torch.Tensor]  # loss of the network on a batch
    lr: float  # learning rate at its peak
    weight_decay: float
    grad_clip: float  # largest norm of the gradients


def build_recipe(model_name: str, settings: Settings, seed: int = 0) -> Recipe:
    """Return the recipe of one of `config.MODELS`."""
    network = build_model(model_name, settings, seed)
    lr = settings.unet_lr if model_name == "unet" else settings.demucs_lr
    return Recipe(network, _snr_objective, lr, settings.weight_decay, settings.grad_clip)


def _snr_objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return snr_loss(model(batch.mixture), batch.target, batch.mixture)


def snr_loss(
    estimate: torch.Tensor, target: torch.Tensor, mixture: torch.Tensor, floor_db: float = -30.0
) -> torch.Tensor:
    """Return the loss: negative signal-to-noise ratio in dB, averaged over the examples.

    All signals are `(batch, channels, samples)`. The energies of error and target are measured
    above a floor, `floor_db` below the mixture, so that silent targets have a finite loss.
    """
    signals = (estimate - target, target, mixture)
    error, signal, level = (x.square().mean(dim=(1, 2)) for x in signals)  # each (batch,)
    floor = level * 10 ** (floor_db / 10) + 1e-8
    return 10 * torch.log10((error + floor) / (signal + floor)).mean()


def learning_rate(step: int, settings: Settings, peak: float) -> float:
    """Return the learning rate: linear warm-up to `peak`, then a cosine down to 1 % of it."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    run: Run, store: Store, target: str, model_name: str, seed: int = 0, on_validation=None
) -> torch.nn.Module:
    """Train a model, resume an interrupted training, or load a model that is trained already.

    Writes model.safetensors (weights of the best validation score), history.csv, last.ckpt and in
    the end model.json. A file lock makes other processes that train the same model wait.

    Parameters
    ----------
    run, store
    target, model_name : str
        Stem to extract; one of `config.MODELS`.
    seed : int
        Of the initial weights and of the batches.
    on_validation : callable, optional
        Gets the history, a DataFrame, after each validation.

    Returns
    -------
    Module
        In evaluation mode, see `load_model`.

    Raises
    ------
    FloatingPointError, MemoryError, ValueError
        The loss is NaN; a batch is too large; the settings do not fit the machine or the data.
    """
    job = (target, model_name, seed)
    folder, identity = run.model_folder(*job), training_identity(run.settings, store, *job)
    if run.settings.devices > 1 and not is_trained(folder, identity):
        check_device(run.settings)
        with file_lock(folder):
            train_in_processes(run, *job, on_validation)
    train_in_this_process(run, store, *job, on_validation)
    return load_model(folder)


def train_in_this_process(
    run: Run, store: Store, target: str, model_name: str, seed: int = 0, on_validation=None
) -> None:
    """Train a model if it is not trained yet: alone, or as one of the processes of torchrun."""
    settings, job = run.settings, (target, model_name, seed)
    folder, identity = run.model_folder(*job), training_identity(settings, store, *job)
    if is_trained(folder, identity):
        return
    if not any(reference.any() for _, reference in middle_excerpts(store, settings, target)):
        raise ValueError(
            f"{target} is silent in the middle {settings.valid_s:g} s of every validation track: "
            "raise valid_s, or choose other validation tracks."
        )
    check_device(settings)
    recipe = build_recipe(model_name, settings, seed)
    if settings.start_from:
        load_pretrained_weights(recipe.network, settings, *job)
    run.write_settings()  # from now on they are fixed
    with file_lock(folder) if "WORLD_SIZE" not in os.environ else nullcontext():
        if is_trained(folder, identity):  # by another process while this one waited for the lock
            return
        reset_peak_memory(settings)
        state = fit(settings, store, identity, folder, recipe, on_validation)
        results = {key: state[key] for key in ("best_step", "best_weights", "train_s")}
        results |= dict(
            steps=state["step"],
            valid_sdr=state["best"],
            processes=int(os.environ.get("WORLD_SIZE", 1)),
            parameters=count_parameters(recipe.network),
            peak_memory_mb=peak_memory_mb(settings),
        )
        if os.environ.get("RANK", "0") == "0":  # one process writes
            write_text(folder / "model.json", json.dumps(identity | results, indent=2) + "\n")


def training_identity(
    settings: Settings, store: Store, target: str, model_name: str, seed: int
) -> dict:
    """Return what is trained: everything that the weights depend on."""
    identity = dict(model=model_name, target=target, seed=seed, data=store.sha)
    return identity | dict(settings=settings.model_dump(mode="json"))


def load_pretrained_weights(
    network: torch.nn.Module, settings: Settings, target: str, model_name: str, seed: int
) -> None:
    """Copy the weights of the same model in the run `start_from` into `network`."""
    run = Run(settings.start_from, settings, results_folder() / settings.start_from)
    folder = run.model_folder(target, model_name, seed)
    pretrained = load_model(folder)
    try:
        if pretrained.sample_rate != settings.sample_rate:
            raise ValueError(f"its sample_rate is {pretrained.sample_rate}")
        network.load_state_dict(pretrained.state_dict())
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"Cannot start from {folder}, a different model: {reason}") from None


def fit(
    settings: Settings, store: Store, identity: dict, folder: Path, recipe: Recipe, callback=None
) -> dict:
    """Run the training loop; resume from last.ckpt in `folder` if it has the same `identity`.

    Calls `callback` with the history after each validation. Returns the state: step, train_s, best
    (validation SDR in dB), best_step, best_weights (raw or ema), losses since the last validation,
    history (a dict per validation).
    """
    fabric = create_fabric(settings)
    model, optimizer = setup_optimizer(fabric, recipe)
    average = copy_network(recipe.network)
    networks = {"raw": recipe.network, "ema": average}
    parts = networks | {"optimizer": optimizer}
    state = resume(folder, parts, identity)
    mixer = Mixer(store, settings, identity["target"], identity["seed"])
    share = fabric.global_rank, fabric.world_size  # of every batch, for this process

    with TrainingMonitor(fabric, settings, identity, state) as monitor:
        for batch in mixer.batches(state["step"], settings.steps, fabric.device, share):
            lr = learning_rate(state["step"], settings, recipe.lr)
            loss = train_step(fabric, model, optimizer, recipe, batch, lr)
            update_ema(average, recipe.network, settings.ema_decay)
            state["step"] += 1
            is_last = state["step"] == settings.steps
            validating = is_last or state["step"] % settings.valid_every == 0
            monitor.step(loss, recipe.network, batch, check=validating)
            if not fabric.is_global_zero:
                continue  # the other processes wait for the main process at their next step
            if validating:
                raw = validate(recipe.network, store, settings, identity["target"])
                ema = validate(average, store, settings, identity["target"])
                _add_to_history(state, settings, raw, ema, lr)
                keep_best(folder, networks, state)
            if validating or monitor.save_is_due():
                save_checkpoint(folder, parts, state, identity)
                if validating and callback:
                    callback(pd.DataFrame(state["history"]))
                monitor.saved()
    return state


def train_step(
    fabric: Fabric, model: torch.nn.Module, optimizer, recipe: Recipe, batch: Batch, lr: float
) -> torch.Tensor:
    """Do one optimisation step: forward, loss, backward, clip, update; return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = recipe.objective(model, batch)
    fabric.backward(loss)
    # To check that the norm is finite would make every step wait for the GPU.
    fabric.clip_gradients(model, optimizer, max_norm=recipe.grad_clip, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()  # stays on the device


def setup_optimizer(fabric: Fabric, recipe: Recipe) -> tuple:
    """Return the network, moved to its device, and AdamW, both wrapped by `fabric`."""
    network = recipe.network
    if fabric.world_size > 1 and fabric.device.type == "cuda":  # statistics of the whole batch
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    options: Any = dict(lr=recipe.lr, weight_decay=recipe.weight_decay)
    options |= dict(fused=fabric.device.type == "cpu")  # faster there; does not fit 16-mixed
    return fabric.setup(network, torch.optim.AdamW(network.parameters(), **options))


def copy_network(network: torch.nn.Module) -> torch.nn.Module:
    """Copy a network, for the moving average of its weights."""
    average = deepcopy(network)
    for layer in average.modules():
        if isinstance(layer, torch.nn.RNNBase):
            layer.flatten_parameters()  # cuDNN needs the weights side by side in memory
    return average


def update_ema(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """Update the exponential moving average (EMA) of weights and running statistics."""
    pairs = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
    pairs = [pair for pair in pairs if pair[0].is_floating_point()]
    averages, weights = (list(tensors) for tensors in zip(*pairs, strict=True))
    get_ema_multi_avg_fn(decay)(averages, weights, None)  # AveragedModel makes a GPU wait


def _add_to_history(state: dict, settings: Settings, raw: float, ema: float, lr: float) -> None:
    """Add a row with the validation SDR of the raw and the averaged weights."""
    audio_s = state["step"] * settings.batch_size * settings.segment_s
    row = dict(step=state["step"], train_loss_db=float(np.mean(state["losses"])))
    row |= dict(valid_sdr_db=max(raw, ema), raw_sdr_db=raw, ema_sdr_db=ema, lr=lr)
    row |= dict(train_s=state["train_s"], audio_s_per_s=audio_s / state["train_s"])
    state["history"].append(row)
    state["losses"] = []


def validate(model: torch.nn.Module, store: Store, settings: Settings, target: str) -> float:
    """Return the median utterance SDR in dB over the middle `valid_s` of the validation tracks."""
    vars(model)["segment_s"] = settings.segment_s  # length of the chunks in `separate`
    scores = []
    for mixture, reference in middle_excerpts(store, settings, target):
        estimate = separate(model, mixture, store.sample_rate)
        scores.append(utterance_sdr(reference.T, estimate.T))
    return float(np.nanmedian(scores))


def middle_excerpts(
    store: Store, settings: Settings, target: str, split: str = "valid"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the middle `valid_s` of tracks: mixture and reference, both `(channels, samples)`."""
    for track in store.split(split):
        length = min(track.samples, round(settings.valid_s * store.sample_rate))
        mixture, stems = store.load(track, (track.samples - length) // 2, length)
        yield mixture, stems[store.stem_index(target)]


def reconstruction_check(
    model_name: str, store: Store, settings: Settings, n_steps: int = 50, every: int = 5
) -> pd.DataFrame:
    """Train a model to return the mixture itself and score it on an unseen track.

    Returns
    -------
    DataFrame
        Columns step and sdr_db, on up to 10 s of the first validation track.
    """
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    peak = 4e-3  # twice the learning rate of separation
    recipe = build_recipe(model_name, settings)
    network, (model, optimizer) = recipe.network, setup_optimizer(fabric, recipe)
    vars(network)["segment_s"] = settings.segment_s
    mixer, track = Mixer(store, settings, store.stems[0]), store.split("valid")[0]
    mixture, _ = store.load(track, 0, min(track.samples, 10 * store.sample_rate))
    rows, first = [], settings.stage3_step  # from which on a batch has all sources
    batches = mixer.batches(first, first + n_steps, fabric.device)
    bar = tqdm(batches, desc=f"{model_name} reconstructs", total=n_steps, mininterval=1)
    for step, batch in enumerate(bar, 1):
        lr = peak * min(1.0, 2 * (1 - step / (n_steps + 1)))
        batch = replace(batch, target=batch.mixture)
        train_step(fabric, model, optimizer, recipe, batch, lr)
        if step % every == 0 or step == n_steps:
            estimate = separate(network, mixture, store.sample_rate)
            rows.append(dict(step=step, sdr_db=utterance_sdr(mixture.T, estimate.T)))
    return pd.DataFrame(rows)


def load_history(folder: Path) -> pd.DataFrame:
    """Return history.csv of a model folder, one row per validation, with a column valid_sdr_db."""
    return pd.read_csv(folder / "history.csv")
