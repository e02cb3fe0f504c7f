"""Saving and resuming a training: the best weights, the history and the checkpoint last.ckpt."""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save

from mss_utils.config import Settings
from mss_utils.files import write_bytes, write_text

# Settings that do not change the trained weights: other values need no new training.
NO_EFFECT_ON_WEIGHTS = {
    *("profile", "data", "target", "seeds", "device", "devices", "excerpt_s", "loader_workers"),
    *("scorer", "cross_check_tracks", "ablations", "data_study"),
}


def is_trained(folder: Path, identity: dict) -> bool:
    """Return whether `folder` holds the finished model of the training with this identity."""
    try:
        description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        is_same = _fingerprint(description) == _fingerprint(identity)
        return is_same and (folder / "model.safetensors").is_file()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # there is no model.json, or it does not describe a model


def _fingerprint(identity: dict) -> dict:
    """Return the part of an identity that the weights depend on."""
    settings = Settings.model_validate(identity["settings"])  # adds settings of newer versions
    settings = settings.model_dump(mode="json", exclude=NO_EFFECT_ON_WEIGHTS)
    other = "demucs_" if identity["model"] == "unet" else "unet_"  # settings of other models
    settings = {key: settings[key] for key in settings if not key.startswith(other)}
    names = ("model", "target", "seed", "data")
    return {name: identity[name] for name in names} | {"settings": settings}


def keep_best(folder: Path, networks: dict[str, torch.nn.Module], state: dict) -> None:
    """Write the better weights of the newest validation if they are the best so far."""
    newest = state["history"][-1]
    if newest["valid_sdr_db"] > state["best"] or not state["best_step"]:
        better = "ema" if newest["ema_sdr_db"] >= newest["raw_sdr_db"] else "raw"
        state.update(best=newest["valid_sdr_db"], best_step=state["step"], best_weights=better)
        write_tensors(folder / "model.safetensors", networks[better].state_dict())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_bytes(path, data)  # safetensors itself raises no OSError on a full disk


def save_checkpoint(folder: Path, parts: dict, state: dict, identity: dict) -> None:
    """Write history.csv and last.ckpt; `parts` are the networks and the optimizer by name."""
    if state["history"]:
        write_text(folder / "history.csv", pd.DataFrame(state["history"]).to_csv(index=False))
    tensors = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save(dict(identity=_fingerprint(identity), state=state, parts=tensors), buffer)
    write_bytes(folder / "last.ckpt", buffer.getbuffer())  # torch itself raises no OSError


def resume(folder: Path, parts: dict, identity: dict) -> dict:
    """Load last.ckpt into `parts` and return the state of the training.

    A checkpoint that cannot be used causes a warning. Then, and without a checkpoint, `parts` stay
    as they are, the state is that of step 0, and results of another training are deleted.
    """
    path = folder / "last.ckpt"
    if path.exists():
        try:
            return _load_checkpoint(path, parts, identity)
        except ValueError as error:
            message = f"Cannot resume from {path}: {error}. Training restarts from step 0."
            warnings.warn(message, stacklevel=2)
    for name in ("model.json", "history.csv"):  # they belong to another training
        (folder / name).unlink(missing_ok=True)
    state = dict(step=0, train_s=0.0, best=-math.inf, best_step=0, best_weights="raw")
    return state | dict(losses=[], history=[])


def _load_checkpoint(path: Path, parts: dict, identity: dict) -> dict:
    """Load a checkpoint; raise ValueError with the reason and leave `parts` as they were."""
    data = path.read_bytes()
    try:
        if zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch.load compares no checksums
            raise ValueError
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state, is_same = checkpoint["state"], checkpoint["identity"] == _fingerprint(identity)
    except Exception:  # zipfile, pickle and torch raise errors of many types
        raise ValueError("the file is damaged or is not a checkpoint") from None
    if not is_same:
        raise ValueError("it belongs to a training with other settings or data")
    if state["best_step"] and not (path.parent / "model.safetensors").is_file():
        raise ValueError("model.safetensors is missing")
    before = deepcopy([part.state_dict() for part in parts.values()])
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint["parts"][name])
    except (KeyError, RuntimeError, ValueError):
        for part, tensors in zip(parts.values(), before, strict=True):
            part.load_state_dict(tensors)
        raise ValueError("its tensors do not fit the model") from None
    return state
