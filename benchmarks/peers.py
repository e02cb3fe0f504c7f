"""Train our three models and four peers for the same time on the same batches, and score them.

    candidates --speed--> steps in the time --choose--> a size for each peer --train--> weights
    --score--> tracks --> table

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/peers.py --data DIR --profile musdb7 --target vocals --minutes 10

A peer keeps its own loss, learning rate and normalisation; store, segments, augmentation,
curriculum, schedule and clipping are ours. Seconds a step are measured once, on an otherwise idle
machine; from then on the time is a number of steps. Finished stages in OUT are skipped, and a
stopped training resumes; several calls with --stage train --only may run side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from demucs.demucs import Demucs
from lightning_fabric import Fabric
from openunmix.model import OpenUnmix, Separator
from openunmix.transforms import ComplexNorm, make_filterbanks
from openunmix.utils import bandwidth_to_max_bin
from safetensors.torch import load_file
from sklearn.preprocessing import StandardScaler
from throughput import show
from torch import nn
from torch.nn.functional import l1_loss, mse_loss, pad
from torchaudio.models import ConvTasNet, HDemucs

from mss_utils.config import MODELS, Settings, expand_path, resolve_settings, results_folder
from mss_utils.data import MIXTURE, Store, Track, open_store
from mss_utils.evaluation.scores import Estimates, real_time_factor
from mss_utils.evaluation.scores import score as test_scores
from mss_utils.evaluation.statistics import median_interval
from mss_utils.files import write_text
from mss_utils.mixing import Batch, Mixer
from mss_utils.separation import separate
from mss_utils.training.checkpoints import is_trained
from mss_utils.training.loop import (
    Recipe,
    build_recipe,
    copy_network,
    fit,
    setup_optimizer,
    train_step,
    training_identity,
    update_ema,
)

SEED = 0
WARM_UP_STEPS, MIN_STEPS, MEASURED_S = 2, 3, 12.0
NO_CLIPPING = 1e9
SHARES = dict(stage2_step=0.04, stage3_step=0.10, warmup_steps=0.05)  # of all steps
# The peer that works as a model of ours does: on the spectrogram, or on the waveform.
NEAREST = dict(
    unet=("open_unmix",),
    demucs_lstm=("demucs", "conv_tasnet"),
    demucs_attention=("demucs", "conv_tasnet"),
)


@dataclass(frozen=True)
class Bench:
    """What every stage works on; `only` holds the names of the models to work on."""

    settings: Settings
    store: Store
    out: Path
    minutes: float
    choice_minutes: float
    only: tuple[str, ...]

    def table(self, name: str) -> pd.DataFrame:
        """Read a table of an earlier stage; FileNotFoundError if it is missing."""
        if not (self.out / f"{name}.csv").exists():
            raise FileNotFoundError(
                f"No {name}.csv in {self.out}: run the stages before this one first."
            )
        return pd.read_csv(self.out / f"{name}.csv")

    def write(self, name: str, table: pd.DataFrame) -> None:
        write_text(self.out / f"{name}.csv", table.to_csv(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", default="", metavar="DIR", help="dataset root (default: the profile's own)"
    )
    parser.add_argument("--profile", default="musdb7")
    parser.add_argument("--target", default="", help="stem to extract (default: the profile's)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="settings on top of the profile"
    )
    parser.add_argument("--minutes", type=float, default=10, help="training time of each model")
    parser.add_argument(
        "--choice-minutes",
        type=float,
        default=1.5,
        help="training time of each size of a peer, to choose one",
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="default: results/peers/PROFILE-TARGET"
    )
    parser.add_argument(
        "--stage",
        nargs="*",
        choices=STAGES,
        default=list(STAGES),
        help="default: all, in this order",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=(*MODELS, *PEERS),
        default=[*MODELS, *PEERS],
        metavar="NAME",
        help="models to work on",
    )
    given = parser.parse_args()
    settings = resolve_settings(given.profile, given.data, given.target, given.set)
    out = (
        expand_path(given.out)
        if given.out
        else results_folder() / "peers" / f"{given.profile}-{settings.target}"
    )
    bench = Bench(
        settings, open_store(settings), out, given.minutes, given.choice_minutes, tuple(given.only)
    )
    for stage in given.stage:
        STAGES[stage](bench)


# --- the peers: `(batch, channels, samples)` in and out, any number of samples


class Unmix(nn.Module):
    """Open-Unmix for one target, as its scripts/train.py trains it and its Separator applies it.

    Source: F.-R. Stoeter et al., "Open-Unmix - A Reference Implementation for Music Source
    Separation", JOSS 4(41), 2019.
    """

    def __init__(self, settings: Settings, store: Store, hidden_size: int):
        super().__init__()
        # 4096 and 1024 at 44.1 kHz are its defaults (93 ms); below, the power of two that lasts
        # about as long.
        self.n_fft, hop = (4096, 1024) if settings.sample_rate == 44100 else (2048, 512)
        stft, _ = make_filterbanks(self.n_fft, hop)
        self.encoder = nn.Sequential(stft, ComplexNorm(mono=settings.channels == 1))
        mean, scale = _statistics(store, self.encoder)
        max_bin = int(
            bandwidth_to_max_bin(settings.sample_rate, self.n_fft, 16000)
        )  # 16 kHz: its --bandwidth
        unmix = OpenUnmix(
            self.n_fft // 2 + 1,
            settings.channels,
            hidden_size,
            input_mean=mean,
            input_scale=scale,
            max_bin=max_bin,
        )
        # Its documented post-processing: one EM step of the Wiener filter, which for a single
        # target needs the residual.
        self.separator = Separator(
            {"target": unmix},
            1,
            False,
            True,
            settings.sample_rate,
            self.n_fft,
            hop,
            settings.channels,
        )
        window = self.separator.stft.window.clone()  # a safetensors file holds no tensor twice
        self.separator.istft.window = nn.Parameter(window, requires_grad=False)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        return self.separator(_at_least(self.n_fft, mixture))[:, 0, :, : mixture.shape[-1]]


def _statistics(store: Store, encoder: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of every bin `(bins,)`, as get_statistics of its train.py."""
    scaler = StandardScaler()
    for track in store.split("train"):
        mixture, _ = store.load(track)
        magnitudes = encoder(torch.from_numpy(mixture)[None]).mean(
            dim=1
        )  # (1, bins, frames), downmixed
        scaler.partial_fit(magnitudes[0].T.numpy())
    return scaler.mean_, np.maximum(scaler.scale_, 1e-4 * scaler.scale_.max())


class TimeDemucs(nn.Module):
    """Demucs on the waveform, as in demucs 4.1.0; it pads, resamples and normalises its input.

    Source: A. Defossez et al., "Music Source Separation in the Waveform Domain", arXiv:1911.13254,
    version 3 of the code.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        common = dict(samplerate=settings.sample_rate, segment=settings.segment_s)
        self.network = Demucs([settings.target], settings.channels, **common, **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        return self.network(mixture)[:, 0]


class HybridDemucs(nn.Module):
    """Hybrid Demucs of torchaudio, between waveform and spectrogram.

    Source: A. Defossez, "Hybrid Spectrogram and Waveform Source Separation", MDX workshop, 2021.
    Its users normalise the mixture by its mono downmix: torchaudio's tutorial on Hybrid Demucs;
    1e-8 against silence as in demucs.separate.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        self.network = HDemucs([settings.target], settings.channels, **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        mono = mixture.mean(dim=1, keepdim=True)
        mean, scale = mono.mean(dim=-1, keepdim=True), mono.std(dim=-1, keepdim=True) + 1e-8
        estimate = self.network(_at_least(self.network.nfft, (mixture - mean) / scale))[
            :, 0, :, : mixture.shape[-1]
        ]
        return estimate * scale + mean


class TasNet(nn.Module):
    """Conv-TasNet of torchaudio in the size conv_tasnet_base, ReLU masks; one source, mono.

    Source: Y. Luo, N. Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking",
    IEEE/ACM TASLP 27(8), 2019.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        if settings.channels != 1:
            raise ValueError(
                f"torchaudio's Conv-TasNet is mono, but channels={settings.channels}: leave it out."
            )
        self.network = ConvTasNet(num_sources=1, msk_activate="relu", **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        return self.network(mixture)


def _at_least(samples: int, audio: torch.Tensor) -> torch.Tensor:
    """`audio` with silence at its end, if it is shorter than a window."""
    return pad(audio, (0, max(0, samples - audio.shape[-1])))


def magnitude_error(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return Open-Unmix's loss (train in its scripts/train.py): squared error of magnitudes."""
    unmix = model.separator.target_models["target"]
    return mse_loss(unmix(model.encoder(batch.mixture)), model.encoder(batch.target))


def waveform_error(model: nn.Module, batch: Batch) -> torch.Tensor:
    """L1 on the waveform: optim.loss in Demucs' conf/config.yaml.

    Conv-TasNet's own SI-SNR leaves the scale of the estimate open, and here the estimate is taken
    from the mixture; the paper of Demucs trained it for music with this loss.
    """
    return l1_loss(model(batch.mixture), batch.target)


# Network, then as in a Recipe loss, learning rate, weight decay and gradient clipping of each peer;
# AdamW for all, which for decays so small is Adam. 1e-3, 1e-5, none: defaults of Open-Unmix's
# scripts/train.py; 3e-4, 0, none: optim in Demucs' conf/config.yaml, for both of its models; 1e-3,
# 0, 5: section III.C of Conv-TasNet.
PEERS = dict(
    open_unmix=(Unmix, magnitude_error, 1e-3, 1e-5, NO_CLIPPING),
    demucs=(TimeDemucs, waveform_error, 3e-4, 0.0, NO_CLIPPING),
    hdemucs=(HybridDemucs, waveform_error, 3e-4, 0.0, NO_CLIPPING),
    conv_tasnet=(TasNet, waveform_error, 1e-3, 0.0, 5.0),
)
# Defaults of each package (of torchaudio's three Hybrid Demucs the one for rates up to 32 kHz), and
# a size nearer to ours in parameters or, for Conv-TasNet, in cost: fewer and longer frames, half
# the channels inside a block.
SIZES = dict(
    open_unmix=dict(documented=dict(hidden_size=512), near=dict(hidden_size=256)),
    demucs=dict(documented=dict(channels=64, depth=6), near=dict(channels=32, depth=5)),
    hdemucs=dict(
        documented=dict(channels=48, nfft=2048, depth=6), near=dict(channels=24, nfft=1024, depth=5)
    ),
    conv_tasnet=dict(
        documented=dict(enc_kernel_size=16), near=dict(enc_kernel_size=80, msk_num_hidden_feats=256)
    ),
)


def candidates(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """List name and size of what may be trained; the profile sets the size of our models."""
    ours = [(name, "profile") for name in MODELS]
    peers = [(name, size) for name in PEERS for size in SIZES[name]]
    return [(name, size) for name, size in ours + peers if name in names]


def recipe(name: str, size: str, settings: Settings, store: Store) -> Recipe:
    """How one candidate is built and trained, always from the same weights."""
    if name in MODELS:
        return build_recipe(name, settings, SEED)
    network, *training = PEERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Recipe(network(settings, store, **SIZES[name][size]), *training)


# --- speed: how many steps the time is worth


def speed(bench: Bench) -> None:
    """Write speed.csv, a row at a time; candidates that have one are not measured again."""
    path = bench.out / "speed.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    measured = {(row["name"], row["size"]) for row in rows}
    for name, size in candidates(bench.only):
        if (name, size) not in measured:
            rows.append(
                dict(name=name, size=size)
                | measure(bench, recipe(name, size, bench.settings, bench.store))
            )
            bench.write("speed", pd.DataFrame(rows))
            print(f"{name} ({size}): {rows[-1]['step_s']:.3f} s a step", flush=True)


def measure(bench: Bench, candidate: Recipe) -> dict:
    """Trained parameters, and seconds a step on all sources, from mixing to the running average."""
    settings, network = bench.settings, candidate.network
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    model, optimizer = setup_optimizer(fabric, candidate)
    average, count = copy_network(network), -WARM_UP_STEPS
    with closing(
        Mixer(bench.store, settings, settings.target, SEED).batches(
            settings.stage3_step, 10**9, fabric.device
        )
    ) as batches:
        for batch in batches:
            train_step(
                fabric, model, optimizer, candidate, batch, candidate.lr
            ).item()  # which waits for the device
            update_ema(average, network, settings.ema_decay)
            count += 1
            if count <= 0:
                started = time.perf_counter()
            elif count >= MIN_STEPS and time.perf_counter() - started >= MEASURED_S:
                break
    step_s = (time.perf_counter() - started) / count
    parameters = sum(
        parameter.numel() for parameter in network.parameters() if parameter.requires_grad
    )
    audio_s_per_s = settings.batch_size * settings.segment_s / step_s
    return dict(parameters=parameters, step_s=step_s, audio_s_per_s=audio_s_per_s)


def steps_in(minutes: float, bench: Bench, name: str, size: str) -> int:
    """Return how many steps of a candidate fit into the time, by speed.csv; at least one."""
    return max(
        1,
        int(60 * minutes / bench.table("speed").set_index(["name", "size"])["step_s"][name, size]),
    )


# --- choose and train


def choose(bench: Bench) -> None:
    """Train both sizes of each peer briefly; choice.csv marks the better one on validation."""
    for name, size in candidates(tuple(name for name in bench.only if name in PEERS)):
        trained(
            bench,
            name,
            size,
            bench.out / "choice" / f"{name}-{size}",
            steps_in(bench.choice_minutes, bench, name, size),
        )
    rows = []
    for name, size in candidates(tuple(PEERS)):
        path = bench.out / "choice" / f"{name}-{size}" / "model.json"
        if path.exists():
            words = ", ".join(f"{key} {value}" for key, value in SIZES[name][size].items())
            rows.append(
                dict(
                    name=name,
                    size=size,
                    settings=words,
                    valid_sdr=json.loads(path.read_text())["valid_sdr"],
                )
            )
    table = pd.DataFrame(rows, columns=["name", "size", "settings", "valid_sdr"])
    bench.write(
        "choice", table.assign(chosen=table.index.isin(table.groupby("name")["valid_sdr"].idxmax()))
    )


def train(bench: Bench) -> None:
    """Train what was chosen for the time that everybody has."""
    for name, size in chosen(bench):
        trained(
            bench,
            name,
            size,
            bench.out / "models" / name,
            steps_in(bench.minutes, bench, name, size),
        )


def chosen(bench: Bench) -> list[tuple[str, str]]:
    """List name and size of our models and the chosen peers, of those that `only` names."""
    sizes = dict.fromkeys(MODELS, "profile")
    if any(name in PEERS for name in bench.only):
        choice = bench.table("choice")
        sizes |= choice[choice["chosen"]].set_index("name")["size"].to_dict()
    return [(name, size) for name, size in candidates(bench.only) if sizes.get(name) == size]


def trained(bench: Bench, name: str, size: str, folder: Path, steps: int) -> None:
    """Train one candidate in `folder`; model.json says that it is finished."""
    settings, model = schedule(bench.settings, steps), name if name in MODELS else f"{name}-{size}"
    identity = training_identity(settings, bench.store, settings.target, model, SEED)
    if not is_trained(folder, identity):
        state = fit(
            settings, bench.store, identity, folder, recipe(name, size, settings, bench.store)
        )
        done = dict(
            steps=state["step"],
            best_step=state["best_step"],
            valid_sdr=state["best"],
            train_s=state["train_s"],
        )
        write_text(folder / "model.json", json.dumps(identity | done, indent=2) + "\n")


def schedule(settings: Settings, steps: int) -> Settings:
    """Put warm-up, curriculum and validations at the same shares of every training."""
    shares = {name: round(share * steps) for name, share in SHARES.items()}
    return settings.model_copy(update=dict(steps=steps, valid_every=steps // 10 or steps, **shares))


# --- score


def score(bench: Bench) -> None:
    """Separate and score the test tracks; write tracks.csv, paired.csv and table.csv."""
    networks = {
        name: load(bench, name, size)
        for name, size in chosen(bench)
        if (bench.out / "models" / name / "model.json").exists()
    }

    def estimates_of(track: Track) -> Estimates:
        mixture, _ = bench.store.load(track)
        found = {
            name: separate(network, mixture, bench.store.sample_rate)
            for name, network in networks.items()
        }
        return {
            (name, SEED): estimate[None] for name, estimate in ({MIXTURE: mixture} | found).items()
        }

    tracks = test_scores(bench.settings, bench.store, estimates_of, n_cross_check=0)["tracks"]
    bench.write("tracks", tracks)
    differences = paired(tracks)
    bench.write("paired", differences)
    table = tabulate(bench, networks, tracks, differences)
    bench.write("table", table)
    show(f"{bench.settings.target}, {bench.minutes:g} minutes each", table)


def load(bench: Bench, name: str, size: str) -> nn.Module:
    """Load a trained network with its best weights and what `separate` needs."""
    network = recipe(name, size, bench.settings, bench.store).network
    network.load_state_dict(load_file(bench.out / "models" / name / "model.safetensors"))
    network.sample_rate, network.channels, network.segment_s = (
        bench.store.sample_rate,
        bench.store.channels,
        bench.settings.segment_s,
    )
    return network.eval()


def paired(tracks: pd.DataFrame) -> pd.DataFrame:
    """Return ours minus peer in utterance SDR: median and 95 % interval, best and nearest peer."""
    scores = tracks.pivot(index="track", columns="model", values="utterance_SDR")
    peers = [name for name in PEERS if name in scores]
    best = scores[peers].median().idxmax() if peers else None
    rows = []
    for ours in (name for name in MODELS if name in scores):
        for peer in (name for name in peers if name == best or name in NEAREST[ours]):
            difference = (scores[ours] - scores[peer]).dropna()
            low, high = median_interval(difference.to_numpy())
            row = dict(
                ours=ours,
                peer=peer,
                best=peer == best,
                nearest=peer in NEAREST[ours],
                median_difference=difference.median(),
            )
            rows.append(row | dict(ci_low=low, ci_high=high, tracks=len(difference)))
    columns = [
        "ours",
        "peer",
        "best",
        "nearest",
        "median_difference",
        "ci_low",
        "ci_high",
        "tracks",
    ]
    return pd.DataFrame(rows, columns=columns)


def tabulate(
    bench: Bench, networks: dict[str, nn.Module], tracks: pd.DataFrame, differences: pd.DataFrame
) -> pd.DataFrame:
    """One row a model: size, cost, scores, and in words how ours differ from the peers."""
    medians = tracks.groupby("model")[["utterance_SDR", "SDR"]].median()
    speeds = bench.table("speed").set_index(["name", "size"])
    rows = [dict(model=MIXTURE) | medians.loc[MIXTURE].to_dict()]
    for name, size in ((name, size) for name, size in chosen(bench) if name in networks):
        known = json.loads((bench.out / "models" / name / "model.json").read_text())
        measured = speeds.loc[(name, size)]
        row = dict(
            model=name, size=size, parameters=int(measured["parameters"]), steps=known["steps"]
        )
        row |= dict(
            audio_s_per_s=measured["audio_s_per_s"],
            inference_rtf=real_time_factor(networks[name], bench.store),
        )
        row |= medians.loc[name].to_dict() | dict(valid_sdr=known["valid_sdr"])
        own = differences[differences["ours"] == name]
        rows.append(
            row
            | {f"minus_{which}_peer": in_words(own[own[which]]) for which in ("best", "nearest")}
        )
    columns = "model size parameters steps audio_s_per_s inference_rtf utterance_SDR SDR valid_sdr"
    columns += " minus_best_peer minus_nearest_peer"
    return pd.DataFrame(rows, columns=columns.split()).astype(
        dict(parameters="Int64", steps="Int64")
    )


def in_words(differences: pd.DataFrame) -> str:
    return "; ".join(
        f"{row.peer} {row.median_difference:+.2f} [{row.ci_low:+.2f}, {row.ci_high:+.2f}]"
        for row in differences.itertuples()
    )


STAGES = dict(speed=speed, choose=choose, train=train, score=score)

if __name__ == "__main__":
    main()
