"""Train our four models and four other models (peers) for the same time, and score them.

    speed     measure seconds per step of every candidate                  speed.csv
    choose    train three variants of each peer briefly, choose the best   choice.csv
    train     train our models and the chosen peers                        models/NAME/
    score     score the test tracks                                        tracks, paired, table.csv

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/peers.py --data DIR --profile musdb7 --target vocals --minutes 10

The variants of a peer are its documented size, a size near ours, and the latter with our recipe:
loss, learning rate, weight decay and gradient clipping of B0, B1 and B2. The other two have the
peer's own recipe. Every peer has its own normalisation. Store, batches, augmentation, curriculum
and learning rate schedule are the same for all models. The stage
`speed` needs an otherwise idle machine; it converts the training time to a number of steps.
Finished work in OUT is skipped, and a stopped training resumes. Several processes may run
`--stage train --only NAME` in parallel, each with another model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from contextlib import closing
from dataclasses import dataclass, replace
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
from throughput import print_table
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
# The peers with the same input as each of our models: spectrogram or waveform.
NEAREST = dict(
    unet=("open_unmix",),
    demucs_framewise=("demucs", "conv_tasnet"),
    demucs_lstm=("demucs", "conv_tasnet"),
    demucs_attention=("demucs", "conv_tasnet"),
)


@dataclass(frozen=True)
class Bench:
    """Arguments of every stage."""

    settings: Settings
    store: Store
    out: Path  # folder of tables and models
    minutes: float  # training time of each model
    choice_minutes: float  # training time of each variant of a peer, to choose one
    only: tuple[str, ...]  # names of the models to work on

    def table(self, name: str) -> pd.DataFrame:
        """Read a table of an earlier stage; FileNotFoundError if it is missing."""
        if not (self.out / f"{name}.csv").exists():
            raise FileNotFoundError(f"No {name}.csv in {self.out}: run the earlier stages first.")
        return pd.read_csv(self.out / f"{name}.csv")

    def write(self, name: str, table: pd.DataFrame) -> None:
        """Write a table as CSV."""
        write_text(self.out / f"{name}.csv", table.to_csv(index=False))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
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
        help="training time of each variant of a peer, to choose one",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="output folder (default: results/peers/PROFILE-TARGET)",
    )
    parser.add_argument(
        "--stage",
        nargs="*",
        choices=STAGES,
        default=list(STAGES),
        help="stages to run (default: all, in this order)",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=(*MODELS, *PEERS),
        default=[*MODELS, *PEERS],
        metavar="NAME",
        help="models to work on",
    )
    return parser.parse_args()


def main() -> None:
    """Run the selected stages."""
    arguments = parse_arguments()
    settings = resolve_settings(arguments.profile, arguments.data, arguments.target, arguments.set)
    out = results_folder() / "peers" / f"{arguments.profile}-{settings.target}"
    bench = Bench(
        settings,
        open_store(settings),
        expand_path(arguments.out) if arguments.out else out,
        arguments.minutes,
        arguments.choice_minutes,
        tuple(arguments.only),
    )
    for stage in arguments.stage:
        STAGES[stage](bench)


# --- peers: input and output are `(batch, channels, samples)`, with any number of samples


class OpenUnmixPeer(nn.Module):
    """Open-Unmix for one target, trained as in its scripts/train.py, applied by its Separator.

    Source: F.-R. Stoeter et al., "Open-Unmix - A Reference Implementation for Music Source
    Separation", JOSS 4(41), 2019.
    """

    def __init__(self, settings: Settings, store: Store, hidden_size: int):
        super().__init__()
        # 4096 and 1024 are its defaults at 44.1 kHz (93 ms); at lower rates, a power of two of
        # similar duration
        self.n_fft, hop = (4096, 1024) if settings.sample_rate == 44100 else (2048, 512)
        stft, _ = make_filterbanks(self.n_fft, hop)
        self.encoder = nn.Sequential(stft, ComplexNorm(mono=settings.channels == 1))
        mean, scale = _bin_statistics(store, self.encoder)
        bandwidth = 16000  # Hz, the default of its --bandwidth
        max_bin = int(bandwidth_to_max_bin(settings.sample_rate, self.n_fft, bandwidth))
        unmix = OpenUnmix(
            self.n_fft // 2 + 1,
            settings.channels,
            hidden_size,
            input_mean=mean,
            input_scale=scale,
            max_bin=max_bin,
        )
        # Its documented post-processing: one EM step of the Wiener filter. With a single target
        # this needs the residual.
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
        window = self.separator.stft.window.clone()  # safetensors cannot save shared tensors
        self.separator.istft.window = nn.Parameter(window, requires_grad=False)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        self.separator.niter = 0 if self.training else 1  # a loss of the waveform needs no EM step
        return self.separator(_pad_to(self.n_fft, mixture))[:, 0, :, : mixture.shape[-1]]


def _bin_statistics(store: Store, encoder: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every bin, both `(bins,)`.

    The same as get_statistics in Open-Unmix's scripts/train.py.
    """
    scaler = StandardScaler()
    for track in store.split("train"):
        mixture, _ = store.load(track)
        magnitudes = encoder(torch.from_numpy(mixture)[None])  # (1, channels, bins, frames)
        scaler.partial_fit(magnitudes.mean(dim=1)[0].T.numpy())
    return scaler.mean_, np.maximum(scaler.scale_, 1e-4 * scaler.scale_.max())


class DemucsPeer(nn.Module):
    """Demucs of demucs 4.1.0, on the waveform; it pads, resamples and normalises its input.

    Source: A. Defossez et al., "Music Source Separation in the Waveform Domain", arXiv:1911.13254,
    version 3 of the code.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        common = dict(samplerate=settings.sample_rate, segment=settings.segment_s)
        self.network = Demucs([settings.target], settings.channels, **common, **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        return self.network(mixture)[:, 0]


class HybridDemucsPeer(nn.Module):
    """Hybrid Demucs of torchaudio, on waveform and spectrogram.

    The mixture is normalised by mean and standard deviation of its mono downmix, as in torchaudio's
    tutorial on Hybrid Demucs; 1e-8 prevents a division by zero, as in demucs.separate.
    Source: A. Defossez, "Hybrid Spectrogram and Waveform Source Separation", MDX workshop, 2021.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        self.network = HDemucs([settings.target], settings.channels, **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        mono = mixture.mean(dim=1, keepdim=True)
        mean, scale = mono.mean(dim=-1, keepdim=True), mono.std(dim=-1, keepdim=True) + 1e-8
        padded = _pad_to(self.network.nfft, (mixture - mean) / scale)
        estimate = self.network(padded)[:, 0, :, : mixture.shape[-1]]
        return estimate * scale + mean


class ConvTasNetPeer(nn.Module):
    """Conv-TasNet of torchaudio, the size of conv_tasnet_base, with ReLU masks; one source, mono.

    Source: Y. Luo, N. Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking",
    IEEE/ACM TASLP 27(8), 2019.
    """

    def __init__(self, settings: Settings, store: Store, **size: int):
        super().__init__()
        if settings.channels != 1:
            raise ValueError(
                f"Conv-TasNet is mono, but channels={settings.channels}: exclude it with --only."
            )
        self.network = ConvTasNet(num_sources=1, msk_activate="relu", **size)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        return self.network(mixture)


def _pad_to(samples: int, audio: torch.Tensor) -> torch.Tensor:
    """Append silence to audio that is shorter than `samples`."""
    return pad(audio, (0, max(0, samples - audio.shape[-1])))


def magnitude_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of magnitudes, the loss in Open-Unmix's scripts/train.py."""
    unmix = model.separator.target_models["target"]
    return mse_loss(unmix(model.encoder(batch.mixture)), model.encoder(batch.target))


def waveform_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the L1 error of the waveform: optim.loss in Demucs' conf/config.yaml.

    Conv-TasNet is trained with it too, as in the paper of Demucs. Its own loss, SI-SNR, does not
    determine the scale of the estimate, but the residual (mixture minus estimate) depends on it.
    """
    return l1_loss(model(batch.mixture), batch.target)


# Network, loss, learning rate, weight decay and gradient clipping of each peer, in the order of
# `Recipe`. All are trained with AdamW, which is practically Adam for such small weight decays.
# Sources: Open-Unmix: defaults of its scripts/train.py. Demucs and Hybrid Demucs: optim in Demucs'
# conf/config.yaml. Conv-TasNet: section III.C of its paper.
PEERS = dict(
    open_unmix=(OpenUnmixPeer, magnitude_loss, 1e-3, 1e-5, NO_CLIPPING),
    demucs=(DemucsPeer, waveform_loss, 3e-4, 0.0, NO_CLIPPING),
    hdemucs=(HybridDemucsPeer, waveform_loss, 3e-4, 0.0, NO_CLIPPING),
    conv_tasnet=(ConvTasNetPeer, waveform_loss, 1e-3, 0.0, 5.0),
)
# documented: the defaults of each package; torchaudio has three Hybrid Demucs, this is the one for
# rates up to 32 kHz. near: about as many parameters as our models; Conv-TasNet has about the same
# cost instead, by fewer and longer frames and half the channels inside a block.
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


OUR_RECIPE = "near-our-recipe"
VARIANTS = ("documented", "near", OUR_RECIPE)


def candidates(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """List name and variant of our models and of the peers, if they are in `names`."""
    ours = [(name, "profile") for name in MODELS]  # the profile sets the size of our models
    peers = list(itertools.product(PEERS, VARIANTS))
    return [(name, variant) for name, variant in ours + peers if name in names]


def size_of(name: str, variant: str) -> dict[str, int]:
    """Return the arguments that set the size of a variant of a peer."""
    return SIZES[name][variant.removesuffix("-our-recipe")]


def candidate_recipe(name: str, variant: str, settings: Settings, store: Store) -> Recipe:
    """Return the recipe of a candidate; the initial weights are always the same."""
    if name in MODELS:
        return build_recipe(name, settings, SEED)
    build, *own = PEERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build(settings, store, **size_of(name, variant))
    if variant == OUR_RECIPE:
        return replace(build_recipe("demucs_lstm", settings), network=network)
    return Recipe(network, *own)


# --- speed: steps per training time


def speed(bench: Bench) -> None:
    """Measure candidates that are not in speed.csv yet, and write it after each of them."""
    path = bench.out / "speed.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    measured = {(row["name"], row["variant"]) for row in rows}
    for name, variant in candidates(bench.only):
        if (name, variant) not in measured:
            recipe = candidate_recipe(name, variant, bench.settings, bench.store)
            rows.append(dict(name=name, variant=variant) | measure_speed(bench, recipe))
            bench.write("speed", pd.DataFrame(rows))
            print(f"{name} ({variant}): {rows[-1]['step_s']:.3f} s per step", flush=True)


def measure_speed(bench: Bench, recipe: Recipe) -> dict:
    """Count the parameters and measure the time of a training step, from mixing to the EMA.

    Returns
    -------
    dict
        `parameters`, the number of trainable parameters; `step_s`, seconds per step;
        `audio_s_per_s`, seconds of audio per second.
    """
    settings, network = bench.settings, recipe.network
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    model, optimizer = setup_optimizer(fabric, recipe)
    average, count = copy_network(network), -WARM_UP_STEPS
    mixer = Mixer(bench.store, settings, settings.target, SEED)
    first = settings.stage3_step  # from this step on the curriculum mixes all sources
    with closing(mixer.batches(first, 10**9, fabric.device)) as batches:
        for batch in batches:
            loss = train_step(fabric, model, optimizer, recipe, batch, recipe.lr)
            loss.item()  # waits for the device
            update_ema(average, network, settings.ema_decay)
            count += 1
            if count <= 0:
                started = time.perf_counter()
            elif count >= MIN_STEPS and time.perf_counter() - started >= MEASURED_S:
                break
    step_s = (time.perf_counter() - started) / count
    trainable = [weights for weights in network.parameters() if weights.requires_grad]
    parameters = sum(weights.numel() for weights in trainable)
    audio_s_per_s = settings.batch_size * settings.segment_s / step_s
    return dict(parameters=parameters, step_s=step_s, audio_s_per_s=audio_s_per_s)


def count_steps(minutes: float, bench: Bench, name: str, variant: str) -> int:
    """Return the number of steps of a candidate in this time, by speed.csv; at least one."""
    step_s = bench.table("speed").set_index(["name", "variant"])["step_s"]
    return max(1, int(60 * minutes / step_s[name, variant]))


# --- choose and train


def choose(bench: Bench) -> None:
    """Train the variants of each peer briefly; mark the one with the best validation SDR."""
    for name, variant in candidates(tuple(name for name in bench.only if name in PEERS)):
        folder = bench.out / "choice" / f"{name}-{variant}"
        n_steps = count_steps(bench.choice_minutes, bench, name, variant)
        train_candidate(bench, name, variant, folder, n_steps)
    rows = []
    for name, variant in candidates(tuple(PEERS)):
        path = bench.out / "choice" / f"{name}-{variant}" / "model.json"
        if path.exists():
            size = size_of(name, variant)
            size_settings = ", ".join(f"{key} {value}" for key, value in size.items())
            rows.append((name, variant, size_settings, json.loads(path.read_text())["valid_sdr"]))
    table = pd.DataFrame(rows, columns=["name", "variant", "settings", "valid_sdr"])
    best = table.groupby("name")["valid_sdr"].idxmax()
    bench.write("choice", table.assign(chosen=table.index.isin(best)))


def train(bench: Bench) -> None:
    """Train our models and the chosen peers, all for the same time."""
    for name, variant in chosen_candidates(bench):
        n_steps = count_steps(bench.minutes, bench, name, variant)
        train_candidate(bench, name, variant, bench.out / "models" / name, n_steps)


def chosen_candidates(bench: Bench) -> list[tuple[str, str]]:
    """List name and variant of our models and the chosen peers, if they are in `bench.only`."""
    variants = dict.fromkeys(MODELS, "profile")
    if any(name in PEERS for name in bench.only):
        choice = bench.table("choice")
        variants |= choice[choice["chosen"]].set_index("name")["variant"].to_dict()
    return [pair for pair in candidates(bench.only) if variants.get(pair[0]) == pair[1]]


def train_candidate(bench: Bench, name: str, variant: str, folder: Path, n_steps: int) -> None:
    """Train one candidate in `folder`, unless it is finished; then write model.json."""
    settings = with_schedule(bench.settings, n_steps)
    model = name if name in MODELS else f"{name}-{variant}"
    identity = training_identity(settings, bench.store, settings.target, model, SEED)
    if not is_trained(folder, identity):
        recipe = candidate_recipe(name, variant, settings, bench.store)
        state = fit(settings, bench.store, identity, folder, recipe)
        results = dict(
            steps=state["step"],
            best_step=state["best_step"],
            valid_sdr=state["best"],
            train_s=state["train_s"],
        )
        write_text(folder / "model.json", json.dumps(identity | results, indent=2) + "\n")


def with_schedule(settings: Settings, steps: int) -> Settings:
    """Set warm-up, curriculum and validation to the same shares of the steps for every model."""
    shares = {name: round(share * steps) for name, share in SHARES.items()}
    return settings.model_copy(update=dict(steps=steps, valid_every=steps // 10 or steps, **shares))


# --- score


def score(bench: Bench) -> None:
    """Separate and score the test tracks; write tracks.csv, paired.csv and table.csv."""
    networks = {
        name: load_network(bench, name, variant)
        for name, variant in chosen_candidates(bench)
        if (bench.out / "models" / name / "model.json").exists()
    }

    def estimates_of(track: Track) -> Estimates:
        mixture, _ = bench.store.load(track)
        estimates = {MIXTURE: mixture}
        for name, network in networks.items():
            estimates[name] = separate(network, mixture, bench.store.sample_rate)
        return {(name, SEED): estimate[None] for name, estimate in estimates.items()}

    tracks = test_scores(bench.settings, bench.store, estimates_of)["tracks"]
    bench.write("tracks", tracks)
    differences = compare_pairs(tracks)
    bench.write("paired", differences)
    table = tabulate(bench, networks, tracks, differences)
    bench.write("table", table)
    print_table(f"{bench.settings.target}, {bench.minutes:g} minutes each", table)


def load_network(bench: Bench, name: str, variant: str) -> nn.Module:
    """Load a trained network with its best weights and the attributes that `separate` reads."""
    network = candidate_recipe(name, variant, bench.settings, bench.store).network
    network.load_state_dict(load_file(bench.out / "models" / name / "model.safetensors"))
    network.sample_rate = bench.store.sample_rate
    network.channels = bench.store.channels
    network.segment_s = bench.settings.segment_s
    return network.eval()


def compare_pairs(tracks: pd.DataFrame) -> pd.DataFrame:
    """Compare each of our models with the best and the nearest peers, track by track.

    Parameters
    ----------
    tracks : DataFrame
        Scores with the columns track, model and utterance_SDR.

    Returns
    -------
    DataFrame
        One row per pair: median over tracks of the difference ours minus peer in dB, and its 95 %
        confidence interval.
    """
    scores = tracks.pivot(index="track", columns="model", values="utterance_SDR")
    peers = [name for name in PEERS if name in scores]
    best = scores[peers].median().idxmax() if peers else None
    rows = []
    for ours in (name for name in MODELS if name in scores):
        for peer in (name for name in peers if name == best or name in NEAREST[ours]):
            difference = (scores[ours] - scores[peer]).dropna()
            interval = median_interval(difference.to_numpy())
            kind = (peer == best, peer in NEAREST[ours])
            rows.append((ours, peer, *kind, difference.median(), *interval, len(difference)))
    columns = "ours peer best nearest median_difference ci_low ci_high tracks"
    return pd.DataFrame(rows, columns=columns.split())


def tabulate(
    bench: Bench, networks: dict[str, nn.Module], tracks: pd.DataFrame, differences: pd.DataFrame
) -> pd.DataFrame:
    """Tabulate variant, cost and scores, one row per model, and how ours differ from the peers."""
    medians = tracks.groupby("model")[["utterance_SDR", "SDR"]].median()
    speeds = bench.table("speed").set_index(["name", "variant"])
    rows = [dict(model=MIXTURE) | medians.loc[MIXTURE].to_dict()]
    for name, variant in (pair for pair in chosen_candidates(bench) if pair[0] in networks):
        description = json.loads((bench.out / "models" / name / "model.json").read_text())
        measured = speeds.loc[(name, variant)]
        row = dict(
            model=name,
            variant=variant,
            parameters=int(measured["parameters"]),
            steps=description["steps"],
        )
        row |= dict(
            audio_s_per_s=measured["audio_s_per_s"],
            inference_rtf=real_time_factor(networks[name], bench.store),
        )
        row |= medians.loc[name].to_dict() | dict(valid_sdr=description["valid_sdr"])
        own = differences[differences["ours"] == name]
        rows.append(
            row
            | {
                f"minus_{which}_peer": format_differences(own[own[which]])
                for which in ("best", "nearest")
            }
        )
    columns = "model variant parameters steps audio_s_per_s inference_rtf utterance_SDR SDR"
    columns += " valid_sdr minus_best_peer minus_nearest_peer"
    return pd.DataFrame(rows, columns=columns.split()).astype(
        dict(parameters="Int64", steps="Int64")
    )


def format_differences(differences: pd.DataFrame) -> str:
    """Format median differences and intervals: `demucs +1.16 [+0.72, +1.55]; ...`."""
    return "; ".join(
        f"{row.peer} {row.median_difference:+.2f} [{row.ci_low:+.2f}, {row.ci_high:+.2f}]"
        for row in differences.itertuples()
    )


STAGES = dict(speed=speed, choose=choose, train=train, score=score)

if __name__ == "__main__":
    main()
