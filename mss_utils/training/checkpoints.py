"""What a training leaves on the disk and goes on from: the best weights, and a checkpoint; all safetensors, nothing is unpickled.

fit --keep_best, save_checkpoint--> model.safetensors, history.csv, last.ckpt --resume--> fit
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from mss_utils.config import Settings, upgrade_settings
from mss_utils.files import atomic_write, write_text

# Settings that leave the trained weights alone; a run may be told other values of these without a new training.
NO_EFFECT_ON_WEIGHTS = (
    "profile",
    "data",
    "target",
    "seeds",
    "device",
    "devices",
    "excerpt_s",
    "loader_workers",
    "scorer",
    "cross_check_tracks",
    "ablations",
    "data_study",
)
NEW = dict(
    step=0, train_s=0.0, best=-math.inf, best_step=0, best_weights="raw", losses=[], history=[]
)  # state of a training


def is_trained(folder: Path, identity: dict) -> bool:
    """Whether `folder` holds a finished model of the same kind, settings and data, with weights that can be read."""
    path = folder / "model.json"
    if not (path.is_file() and _has_weights(folder)):
        return False
    try:
        return _fingerprint(json.loads(path.read_text(encoding="utf-8"))) == _fingerprint(identity)
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # no description of a model: last.ckpt knows how far it was trained
        return False


def _has_weights(folder: Path) -> bool:
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _fingerprint(identity: dict) -> dict:
    complete = Settings().model_dump(mode="json") | upgrade_settings(
        identity["settings"]
    )  # a training older than a setting had its default
    settings = {key: value for key, value in complete.items() if key not in NO_EFFECT_ON_WEIGHTS}
    return {key: identity[key] for key in ("model", "target", "seed", "data")} | {
        "settings": settings
    }


def keep_best(folder: Path, networks: dict[str, torch.nn.Module], state: dict) -> None:
    """Write the better weights of the newest validation, if they are the best so far."""
    newest = state["history"][-1]
    if newest["valid_sdr_db"] > state["best"] or not state["best_step"]:
        better = "ema" if newest["ema_sdr_db"] >= newest["raw_sdr_db"] else "raw"
        state.update(best=newest["valid_sdr_db"], best_step=state["step"], best_weights=better)
        write_tensors(folder / "model.safetensors", networks[better].state_dict())


def save_checkpoint(
    folder: Path, networks: dict, optimizer: torch.optim.Optimizer, state: dict, identity: dict
) -> None:
    """Write the history and, as safetensors, all that is needed to go on; each file is written aside and renamed."""
    tensors = {
        f"{weights}/{key}": tensor
        for weights, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    moments = optimizer.state_dict()["state"]
    tensors |= {
        f"adam/{index}/{key}": tensor
        for index, values in moments.items()
        for key, tensor in values.items()
    }
    about = dict(state=json.dumps(state), identity=json.dumps(_fingerprint(identity)))
    if state["history"]:
        write_text(folder / "history.csv", pd.DataFrame(state["history"]).to_csv(index=False))
    write_tensors(folder / "last.ckpt", tensors, about)


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None
) -> None:
    """A safetensors file; written from bytes, since a full disk is not an OSError to safetensors itself."""
    with atomic_write(path) as part:
        part.write_bytes(
            save({name: tensor.contiguous() for name, tensor in tensors.items()}, about)
        )


def resume(folder: Path, networks: dict, optimizer: torch.optim.Optimizer, identity: dict) -> dict:
    """Put the last checkpoint of the same training into networks and optimizer and return its state.

    Without one that can be used, return a new state; what an older training left, which may be of other data, is no longer valid then.
    """
    about, tensors = _read_checkpoint(folder / "last.ckpt")
    if about.get("identity") == json.dumps(_fingerprint(identity)):
        try:
            return _restored(folder, networks, optimizer, about, tensors)
        except (
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
        ) as error:  # torch says RuntimeError where tensors do not fit
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"{folder / 'last.ckpt'} cannot be gone on from ({reason}): the training begins anew.",
                stacklevel=2,
            )
    for name in ("model.json", "history.csv"):
        (folder / name).unlink(missing_ok=True)
    return dict(NEW, losses=[], history=[])


def _restored(
    folder: Path, networks: dict, optimizer: torch.optim.Optimizer, about: dict, tensors: dict
) -> dict:
    """The state of a checkpoint, once networks and optimizer have its tensors; raises what a damaged one makes torch and json raise."""
    state = json.loads(about["state"])
    if {name: type(value) for name, value in dict(state).items()} != {
        name: type(value) for name, value in NEW.items()
    }:
        raise ValueError("its state is not that of a training")
    if state["best_step"] and not _has_weights(folder):
        raise ValueError("model.safetensors beside it is not there, or damaged")
    under = lambda prefix: {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    weights = {name: under(f"{name}/") for name in networks}
    for name, network in networks.items():
        if {key: value.shape for key, value in weights[name].items()} != {
            key: value.shape for key, value in network.state_dict().items()
        }:
            raise ValueError("its tensors are not those of the model")
    groups = optimizer.state_dict()["param_groups"]
    moments = {index: under(f"adam/{index}/") for group in groups for index in group["params"]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(
        values and values["exp_avg"].shape != parameter.shape
        for values, parameter in zip(moments.values(), parameters)
    ):
        raise ValueError("the moments of Adam are not those of the model")
    optimizer.load_state_dict(
        dict(
            state={index: values for index, values in moments.items() if values},
            param_groups=groups,
        )
    )
    for name, network in networks.items():
        network.load_state_dict(weights[name])
    return state


def _read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a checkpoint says of itself, and its tensors; nothing for a missing file, or one that is no safetensors file."""
    if not path.is_file():
        return {}, {}
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        return about, load_file(path)
    except SafetensorError as error:
        warnings.warn(f"{path} is no checkpoint ({error}): the training begins anew.", stacklevel=2)
        return {}, {}
