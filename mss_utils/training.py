"""The training loop: visible and short; Lightning Fabric carries device and precision.

Taught in notebooks 02 to 04.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from tqdm.auto import tqdm

from mss_utils.data import Store
from mss_utils.metrics import utterance_sdr
from mss_utils.mixing import Mixer
from mss_utils.models import build_model, count_parameters, load_model
from mss_utils.separation import separate
from mss_utils.settings import Run, Settings, replacing, write_text

# Settings that leave the trained weights alone; a run may be told other values of these without a new training.
NOT_TRAINED = ("profile", "data", "target", "seeds", "device", "excerpt_s", "loader_workers")


def snr_loss(estimate: torch.Tensor, target: torch.Tensor, mixture: torch.Tensor, floor_db: float = -30.0) -> torch.Tensor:
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


def train(
    run: Run, store: Store, target: str, model_name: str, seed: int = 0, on_validation: Callable | None = None
) -> torch.nn.Module:
    """Train one model, or load it when the run already holds one that fits settings and data; in evaluation mode.

    Writes model.safetensors (the weights with the best validation score), history.csv, last.ckpt, from which the same
    call goes on after an interruption, and in the end model.json. `on_validation(history)` gets a DataFrame after each
    validation. Raises FloatingPointError when the loss is no longer finite, ValueError when validation would hear no target.
    """
    folder = run.model_folder(target, model_name, seed)
    identity = dict(model=model_name, target=target, seed=seed, data=store.sha, settings=run.settings.model_dump(mode="json"))
    if not is_trained(folder, identity):
        _check_validation(store, run.settings, target)
        run.write_settings()
        state = fit(run.settings, store, identity, folder, on_validation)
        description = identity | dict(
            parameters=count_parameters(build_model(model_name, run.settings)),
            steps=state["step"], best_step=state["best_step"], valid_sdr=state["best"], train_s=state["train_s"],
            peak_memory_mb=peak_memory_mb(),
        )
        write_text(folder / "model.json", json.dumps(description, indent=2) + "\n")
    return load_model(folder)


def fit(settings: Settings, store: Store, identity: dict, folder: Path, on_validation: Callable | None = None) -> dict:
    """The loop: draw, forward, backward, step; validate now and then. Returns the final state, see `_new_state`."""
    name, target, seed = identity["model"], identity["target"], identity["seed"]
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    peak_lr = settings.unet_lr if name == "unet" else settings.demucs_lr
    network = build_model(name, settings, seed)
    adam = torch.optim.AdamW(network.parameters(), lr=peak_lr, weight_decay=settings.weight_decay)
    model, optimizer = fabric.setup(network, adam)
    mixer = Mixer(store, settings, target, seed)
    state = _resume(folder, network, adam, identity)
    bar = tqdm(total=settings.steps, initial=state["step"], desc=f"{name} on {target}", unit="step", mininterval=1)
    losses, started = [], time.perf_counter()

    for batch in mixer.batches(state["step"], settings.steps, fabric.device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], settings, peak_lr)
        losses.append(descend(fabric, model, optimizer, batch.mixture, batch.target, settings.grad_clip))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss of {name} is {losses[-1]} at step {state['step']}: set {_lr_name(name)} lower.")
        state["step"] += 1
        bar.update()
        if state["step"] % settings.valid_every == 0 or state["step"] == settings.steps:
            state["train_s"] += time.perf_counter() - started
            score = validate(network, store, settings, target)
            _record(state, settings, float(np.mean(losses)), score, optimizer.param_groups[0]["lr"])
            _save(folder, network, adam, state, identity)
            bar.set_postfix(loss=f"{np.mean(losses):.2f}", valid_sdr=f"{score:.2f} dB")
            if on_validation:
                on_validation(pd.DataFrame(state["history"]))
            losses, started = [], time.perf_counter()
    bar.close()
    return state


def descend(fabric: Fabric, model, optimizer, mixture: torch.Tensor, wanted: torch.Tensor, grad_clip: float) -> float:
    """One step downhill: forward, loss, backward, clip, update. Returns the loss in dB."""
    loss = snr_loss(model(mixture), wanted, mixture)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def reconstruction_check(model_name: str, store: Store, settings: Settings, n_steps: int = 300, every: int = 25) -> pd.DataFrame:
    """Can the network pass a signal through? Train it with the mixture itself as target; SDR in dB on an unseen song.

    Returns columns step, sdr_db: one row each `every` steps, scored on up to 10 s of the first validation track.
    """
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    network = build_model(model_name, settings)
    peak_lr = 4e-3  # copying is easy: twice the step of a separation, and it is done sooner
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=peak_lr))
    mixer, unseen = Mixer(store, settings, store.stems[0]), store.split("valid")[0]
    mixture, _ = store.load(unseen, 0, min(unseen.samples, 10 * store.sample_rate))
    network.segment_s, rows = settings.segment_s, []
    batches = mixer.batches(settings.stage3_step, settings.stage3_step + n_steps, fabric.device)
    for step, batch in enumerate(tqdm(batches, total=n_steps, desc=f"{model_name} reconstructs", unit="step", mininterval=1), 1):
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, 2 * (1 - step / (n_steps + 1)))
        descend(fabric, model, optimizer, batch.mixture, batch.mixture, settings.grad_clip)
        if step % every == 0 or step == n_steps:
            rows.append(dict(step=step, sdr_db=utterance_sdr(mixture.T, separate(network, mixture, store.sample_rate).T)))
    return pd.DataFrame(rows)


def validate(model: torch.nn.Module, store: Store, settings: Settings, target: str) -> float:
    """Median utterance SDR in dB over the validation tracks, `valid_s` seconds from the middle of each."""
    model.segment_s = settings.segment_s
    row, scores = store.stem_index(target), []
    for mixture, stems in _validation_excerpts(store, settings):
        scores.append(utterance_sdr(stems[row].T, separate(model, mixture, store.sample_rate).T))
    return float(np.nanmedian(scores))


def _validation_excerpts(store: Store, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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


def is_trained(folder: Path, identity: dict) -> bool:
    """Whether `folder` holds a finished model of the same kind, settings and data."""
    path = folder / "model.json"
    if not (path.exists() and (folder / "model.safetensors").exists()):
        return False
    return _fingerprint(json.loads(path.read_text(encoding="utf-8"))) == _fingerprint(identity)


def history(folder: Path) -> pd.DataFrame:
    """One row per validation: step, train_loss_db, valid_sdr_db, lr, train_s, audio_s_per_s."""
    return pd.read_csv(folder / "history.csv")


def peak_memory_mb() -> float:
    """Largest memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _lr_name(model_name: str) -> str:
    return "unet_lr" if model_name == "unet" else "demucs_lr"


def _fingerprint(identity: dict) -> dict:
    settings = {key: value for key, value in identity["settings"].items() if key not in NOT_TRAINED}
    return {key: identity[key] for key in ("model", "target", "seed", "data")} | {"settings": settings}


def _new_state() -> dict:
    return dict(step=0, train_s=0.0, best=-math.inf, best_step=0, history=[])


def _record(state: dict, settings: Settings, loss: float, score: float, lr: float) -> None:
    audio_s = state["step"] * settings.batch_size * settings.segment_s
    state["history"].append(dict(
        step=state["step"], train_loss_db=loss, valid_sdr_db=score, lr=lr, train_s=state["train_s"],
        audio_s_per_s=audio_s / state["train_s"],
    ))


def _save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict, identity: dict) -> None:
    """Keep the best weights, the history, and everything needed to go on; each file is written aside and renamed."""
    score = state["history"][-1]["valid_sdr_db"]
    if score > state["best"] or not state["best_step"]:
        state.update(best=score, best_step=state["step"])
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with replacing(folder / "model.safetensors") as part:
            save_file(weights, part)
    write_text(folder / "history.csv", pd.DataFrame(state["history"]).to_csv(index=False))
    checkpoint = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), state=state, identity=_fingerprint(identity))
    with replacing(folder / "last.ckpt") as part:
        torch.save(checkpoint, part)


def _resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, identity: dict) -> dict:
    """Put the last checkpoint of the same training into model and optimizer and return its state, else a new state."""
    path = folder / "last.ckpt"
    if not path.exists():
        return _new_state()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["identity"] != _fingerprint(identity):
        return _new_state()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["state"]

