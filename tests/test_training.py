import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, command
from safetensors.torch import load_file, save_file

import mss_utils.training as training
from mss_utils.config import MODELS, ROOT, Run
from mss_utils.data import Store
from mss_utils.mixing import Mixer
from mss_utils.training.checkpoints import is_trained
from mss_utils.training.loop import (
    collapse,
    learning_rate,
    reconstruction_check,
    train,
    training_identity,
)


def test_the_learning_rate_rises_and_falls(small_settings):
    settings = small_settings.model_copy(update=dict(warmup_steps=10, steps=110))
    rates = [learning_rate(step, settings, 1.0) for step in range(111)]
    assert rates[0] == 0.1 and max(rates) == 1.0 == rates[10]
    assert math.isclose(rates[60], 0.505) and math.isclose(rates[110], 0.01)


@pytest.mark.parametrize("name", MODELS)
def test_training_writes_what_the_contract_names(small_run, store, name):
    heard = []
    model = train(small_run, store, "piano", name, on_validation=heard.append)
    folder = small_run.model_folder("piano", name)
    assert {path.name for path in folder.glob("[!.]*")} == {
        "model.safetensors",
        "model.json",
        "history.csv",
        "last.ckpt",
    }
    description = json.loads((folder / "model.json").read_text())
    assert (
        description["steps"] == 6
        and description["train_s"] > 0
        and description["peak_memory_mb"] > 50
    )
    history = pd.read_csv(folder / "history.csv")
    assert list(history["step"]) == [3, 6] and len(heard) == 2
    assert description["valid_sdr"] == pytest.approx(history["valid_sdr_db"].max())
    assert description["best_step"] == history.loc[history["valid_sdr_db"].idxmax(), "step"]
    assert not model.training and model.target == "piano"


@pytest.mark.parametrize("name", MODELS)
def test_training_in_bfloat16(small_run, store, name):
    run = Run(
        "bf16", small_run.settings.model_copy(update=dict(precision="bf16-mixed")), small_run.folder
    )
    train(run, store, "piano", name)
    log = training.history(run.model_folder("piano", name))
    assert np.isfinite(log["valid_sdr_db"]).all()
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights_of(run, name)[0].values())


def test_a_trained_model_is_loaded_unless_settings_or_data_changed(small_run, store, monkeypatch):
    train(small_run, store, "piano", "unet")
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    train(small_run, store, "piano", "unet")
    changed = Run(
        small_run.name, small_run.settings.model_copy(update=dict(unet_lr=1e-4)), small_run.folder
    )
    with pytest.raises(pytest.fail.Exception):
        train(changed, store, "piano", "unet")
    folder = small_run.model_folder("piano", "unet")
    identity = dict(
        model="unet",
        target="piano",
        seed=0,
        data="other music",
        settings=small_run.settings.model_dump(mode="json"),
    )
    assert not is_trained(folder, identity)
    assert is_trained(folder, identity | dict(data=store.sha))


def weights_of(run, name):
    """The kept weights, and everything in the checkpoint but the seconds it took."""
    folder = run.model_folder("piano", name)
    return load_file(folder / "model.safetensors"), load_file(folder / "last.ckpt")


def assert_same_weights(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_training_ends_with_the_same_weights(small_run, store, tmp_path, name):
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    train(whole, store, "piano", name)

    def stop(history):
        raise Interrupted

    for step in (3, 6):  # each time it goes on from where the last call was stopped
        with pytest.raises(Interrupted):
            train(small_run, store, "piano", name, on_validation=stop)
        assert training.history(small_run.model_folder("piano", name))["step"].iloc[-1] == step
    assert not (small_run.model_folder("piano", name) / "model.json").exists()
    train(small_run, store, "piano", name)
    assert_same_weights(weights_of(whole, name), weights_of(small_run, name))
    columns = ["step", "train_loss_db", "raw_sdr_db", "ema_sdr_db", "lr"]
    logs = [
        training.history(run.model_folder("piano", name))[columns] for run in (whole, small_run)
    ]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


# A training that kills itself without warning: in the middle of the n-th file it writes, or at the n-th step.
KILLED = """
import os, signal, sys
from mss_utils import checkpoints, training
from mss_utils.data import open_store
from mss_utils.settings import create_or_load_run
where, count, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
module = training if where == "descend" else checkpoints
original, calls = getattr(module, where), 0
def deadly(*given):
    global calls
    calls += 1
    if calls == count:
        if where == "atomic_write":
            original(*given).__enter__().write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)
setattr(module, where, deadly)
training.SAVE_EVERY_S = training.LOOK_EVERY_S = 0.0  # look, and save, after every step
run = create_or_load_run(*arguments)
training.train(run, open_store(run.settings), "piano", "unet")
"""


@pytest.mark.parametrize(
    "where, count", [("descend", 5), ("atomic_write", 1), ("atomic_write", 3), ("atomic_write", 4)]
)
def test_a_killed_training_goes_on(small_run, store, small_settings, tmp_path, where, count):
    """SIGKILL at a step, and in the middle of a checkpoint or of weights (the 3rd file): the next call ends with the same weights."""
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    train(whole, store, "piano", "unet")
    arguments = ["smoke", "small", small_settings.data, "piano", SMALL]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(count), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(small_run, store, "piano", "unet")
    assert_same_weights(weights_of(whole, "unet"), weights_of(small_run, "unet"))
    assert not list(small_run.model_folder("piano", "unet").glob(".part-*"))


def test_a_pickle_is_no_checkpoint(small_run, store):
    folder = small_run.model_folder("piano", "unet")
    folder.mkdir(parents=True)
    torch.save({"model": {}}, folder / "last.ckpt")
    with pytest.warns(UserWarning, match="last.ckpt is no checkpoint.*begins anew"):
        train(small_run, store, "piano", "unet")
    assert training.history(folder)["step"].tolist() == [3, 6]


def test_what_an_older_training_left_does_not_outlive_it(small_run, store, monkeypatch):
    """Killed before its first validation, a training of other settings must not leave a model.json beside weights to come."""
    train(small_run, store, "piano", "unet")
    changed = Run(
        small_run.name, small_run.settings.model_copy(update=dict(unet_lr=1e-4)), small_run.folder
    )
    monkeypatch.setattr(training, "descend", lambda *_: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError):
        train(changed, store, "piano", "unet")
    assert not (small_run.model_folder("piano", "unet") / "model.json").exists()


def test_the_better_of_raw_and_averaged_weights_is_kept(small_run, store, monkeypatch):
    scores = iter([1.0, 2.0, 3.0, 0.0])  # raw and averaged at step 3, raw and averaged at step 6
    monkeypatch.setattr(training, "validate", lambda *_: next(scores))
    train(small_run, store, "piano", "demucs_lstm")
    kept, checkpoint = weights_of(small_run, "demucs_lstm")
    description = json.loads(
        (small_run.model_folder("piano", "demucs_lstm") / "model.json").read_text()
    )
    assert (description["best_weights"], description["best_step"], description["valid_sdr"]) == (
        "raw",
        6,
        3.0,
    )
    assert all(torch.equal(tensor, checkpoint[f"raw/{key}"]) for key, tensor in kept.items())
    assert not all(torch.equal(tensor, checkpoint[f"ema/{key}"]) for key, tensor in kept.items())


def test_two_processes_get_the_gradients_of_one(small_settings, tmp_path):
    """The first moments of Adam after one step are its gradients, clipped, times 0.1: two processes with gloo against one."""
    moments = {}
    for processes in (1, 2):
        overrides = [
            "segment_s=0.5",
            "valid_s=2",
            "steps=1",
            "valid_every=1",
            "batch_size=4",
            f"devices={processes}",
            "device=cpu",
        ]
        name = f"{processes}-processes"
        arguments = [
            "--profile",
            "smoke",
            "--run",
            name,
            "--data",
            small_settings.data,
            "--target",
            "piano",
            "--model",
            "demucs_attention",
        ]
        done = command(
            "train", *arguments, "--set", *overrides, MSS_RESULTS=str(tmp_path), OMP_NUM_THREADS="1"
        )
        assert done.returncode == 0, done.stderr
        folder = tmp_path / name / "models" / "piano" / "demucs_attention" / "seed0"
        assert json.loads((folder / "model.json").read_text())["processes"] == processes
        checkpoint = load_file(folder / "last.ckpt")
        moments[processes] = {
            key: tensor for key, tensor in checkpoint.items() if key.endswith("exp_avg")
        }
    assert moments[1].keys() == moments[2].keys()
    largest = max(tensor.abs().max() for tensor in moments[1].values())
    for key, tensor in moments[1].items():
        torch.testing.assert_close(moments[2][key], tensor, rtol=1e-3, atol=1e-5 * largest.item())


def test_a_batch_that_cannot_be_shared_is_refused(small_run, store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes cannot share batch_size=2"):
        train(small_run, store, "piano", "unet")


def test_b1_and_b2_see_the_same_batches(small_run, store, monkeypatch):
    seen = {}
    for name in ("demucs_lstm", "demucs_attention"):
        batches = seen[name] = []
        original = Mixer.assemble
        monkeypatch.setattr(
            Mixer,
            "assemble",
            lambda *given, original=original, batches=batches: (
                batches.append(b := original(*given)) or b
            ),
        )
        train(small_run, store, "piano", name)
        monkeypatch.undo()
        monkeypatch.setenv("MSS_RESULTS", str(small_run.folder.parent))
    assert len(seen["demucs_lstm"]) == 6
    assert all(
        torch.equal(a.stems, b.stems)
        for a, b in zip(seen["demucs_lstm"], seen["demucs_attention"], strict=True)
    )


def test_validation_tracks_without_the_target_are_noticed_before_the_training(
    small_run, store, monkeypatch
):
    monkeypatch.setattr(
        Store,
        "load",
        lambda self, *given: (np.ones((1, 100)), np.array([[[1.0]], [[1.0]], [[0.0]], [[1.0]]])),
    )
    with pytest.raises(
        ValueError,
        match="piano is silent in the middle 2 s of every validation track.*set valid_s higher",
    ):
        train(small_run, store, "piano", "unet")
    assert not small_run.folder.exists()


def test_a_loss_that_is_not_finite_stops_the_training(small_run, store, monkeypatch):
    losses = iter([1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(training, "descend", lambda *_: torch.tensor(next(losses)))
    with pytest.raises(
        FloatingPointError, match="demucs_lstm is nan at step 1: set demucs_lr lower"
    ):
        train(small_run, store, "piano", "demucs_lstm")


@pytest.mark.parametrize("answer, gain", [("the mixture", 1.0), ("silence", 0.0)])
def test_a_network_that_gave_up_is_noticed(small_settings, store, answer, gain):
    batch = Mixer(store, small_settings, "piano").batch(0)
    network = torch.nn.Conv1d(1, 1, 1, bias=False)
    torch.nn.init.constant_(network.weight, gain + 0.01)
    assert collapse(network, batch) == answer
    torch.nn.init.constant_(network.weight, 0.5)
    assert collapse(network, batch) is None
    right = replace(
        batch, target=gain * batch.mixture
    )  # where that answer is right, it is no fault
    torch.nn.init.constant_(network.weight, gain)
    assert collapse(network, right) is None


def test_a_collapse_is_said_while_training(small_run, store, monkeypatch):
    monkeypatch.setattr(training, "collapse", lambda *_: "the mixture")
    with pytest.warns(
        UserWarning, match="At step 3, unet returns the mixture.*learning rate lower"
    ) as said:
        train(small_run, store, "piano", "unet")
    assert len([warning for warning in said if "returns" in str(warning.message)]) == 1


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_names_the_settings_to_change(small_run, store, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "descend", fail)
    with pytest.raises(
        MemoryError, match="batch_size=2 and segment_s=0.5: set batch_size=1, or segment_s=0.25"
    ):
        train(small_run, store, "piano", "demucs_lstm")
    one = Run("one", small_run.settings.model_copy(update=dict(batch_size=1)), small_run.folder)
    with pytest.raises(MemoryError, match="batch_size=1 and segment_s=0.5: set segment_s=0.25"):
        train(one, store, "piano", "demucs_lstm")


@pytest.mark.parametrize("name", ["demucs_lstm", "demucs_attention"])
def test_the_waveform_models_can_reconstruct_an_unseen_song(name, songs_store):
    """Week 2 of the plan: with the mixture as target, 20 dB on an unseen song within a few hundred steps."""
    store, settings = songs_store
    table = reconstruction_check(name, store, settings, n_steps=100)
    assert table["sdr_db"].max() >= 20


def test_a_setting_that_came_later_had_its_default(store, small_settings, tmp_path):
    identity = training_identity(small_settings, store, "piano", "unet", 0)
    older = identity | dict(
        settings={key: value for key, value in identity["settings"].items() if key != "train_share"}
    )
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(older))
    assert is_trained(tmp_path, identity)
    assert not is_trained(
        tmp_path, identity | dict(settings=identity["settings"] | dict(train_share=0.5))
    )


def test_a_training_may_start_from_another(small_run, store):
    """The first weights are those of the other run; a start that does not fit, or is not there, is said."""
    train(small_run, store, "piano", "unet")
    started = lambda **changes: Run(
        "started",
        small_run.settings.model_copy(update=dict(start_from="small") | changes),
        small_run.folder.parent / "started",
    )
    train(started(unet_lr=1e-12, warmup_steps=0, weight_decay=1e-12), store, "piano", "unet")
    before, after = weights_of(small_run, "unet")[0], weights_of(started(), "unet")[0]
    learnt = [key for key in before if "running" not in key and "tracked" not in key]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in learnt)

    with pytest.raises(ValueError, match="small.*cannot be started from.*same channels"):
        train(started(unet_channels=8), store, "piano", "unet")
    with pytest.raises(ValueError, match="learnt from audio at 16000 Hz, this run has 22050"):
        training.start(None, started(sample_rate=22050).settings, "piano", "unet", 0)
    with pytest.raises(FileNotFoundError, match="No model.json in .*demucs_lstm"):
        train(started(), store, "piano", "demucs_lstm")
