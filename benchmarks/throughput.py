"""Measure time and memory of a training step, and the speed of decoding and data loading.

    decoding   decoding speed: musdb track by track, and the stem store
    loading    loading speed: our loader and open-unmix's loaders, and what training consumes
    steps      time of a training step by part: data, forward, backward, optimiser
    memory     peak memory of a step by batch size, segment and sample rate: two tables, one figure

    python benchmarks/throughput.py [--part steps memory] [--profile demo] [--set key=value ...]
                                    [--data DIR] [--musdb DIR]

`make bench` installs open-unmix and runs all parts. The tables are Markdown. Speeds are in seconds
of audio per second: of tracks for decoding, else of training segments, each with all its stems.
Files are read from the page cache. Steps and memory are measured on the device of the settings, by
default a CUDA GPU if there is one. Compare numbers of one run only, measured on an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import soundfile
import torch
from lightning_fabric import Fabric

from mss_utils.config import MODELS, Settings, expand_path, resolve_settings
from mss_utils.data import build_store, find_tracks, open_store
from mss_utils.data.sources import MUSDB_STEMS
from mss_utils.environment import on_gpu, peak_memory_mb, reset_peak_memory, resident_mb
from mss_utils.files import atomic_write
from mss_utils.mixing import Batch, Mixer
from mss_utils.training.loop import (
    build_recipe,
    copy_network,
    setup_optimizer,
    train_step,
    update_ema,
)

PARTS = ("decoding", "loading", "steps", "memory")
LOADING_SETTINGS = "sample_rate=44100 channels=2 segment_s=8 batch_size=16 curriculum=false"
BATCH_S = 8 * 16
BATCH_MB = BATCH_S * len(MUSDB_STEMS) * 2 * 2 * 44100 / 1e6  # as int16
# With these thresholds glibc returns freed memory to the system at once.
MALLOC_THRESHOLDS = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
MAX_MEMORY_SHARE = 0.6  # of the free memory; skip a step that is expected to need more


def main() -> None:
    """Run the selected parts and print their tables."""
    arguments = parse_arguments()
    if arguments.measure:
        name, settings = arguments.measure
        print(measure_memory_growth_mb(name, Settings.model_validate_json(settings)))
        return
    settings = resolve_settings(arguments.profile, arguments.data, "", arguments.set)
    if "decoding" in arguments.part and not arguments.musdb:
        print("Decoding skipped: set --musdb or MUSDB_PATH to a MUSDB18 folder of stem files.")
    elif "decoding" in arguments.part:
        with fresh_cache() as folder:
            table = measure_decoding(expand_path(arguments.musdb), arguments.tracks, folder)
            print_table("Decoding", table)
    if "loading" in arguments.part:
        with fresh_cache() as folder:
            table = measure_loading(write_noise_dataset(folder / "hq"), arguments.batches)
            print_table("Loading", table)
    if "steps" in arguments.part:
        table = measure_steps(settings, arguments.steps)
        print_table(f"A training step, {format_settings(settings)}", table)
    if "memory" in arguments.part:
        grid = arguments.batch_sizes, arguments.segments, arguments.rates
        measure_memory(settings, *grid, expand_path(arguments.figure))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)"
    )
    folder = os.environ.get("MUSDB_PATH", "")
    help_text = "decoding: folder of stem files (default: MUSDB_PATH)"
    parser.add_argument("--musdb", default=folder, metavar="DIR", help=help_text)
    help_text = "decoding: approximate number of tracks (default: all)"
    parser.add_argument("--tracks", type=int, default=0, help=help_text)
    help_text = "loading: number of batches from each loader"
    parser.add_argument("--batches", type=int, default=40, help=help_text)
    parser.add_argument("--profile", default="demo", help="steps, memory: profile of the settings")
    help_text = "steps, memory: settings on top of the profile"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=help_text)
    help_text = "steps: dataset root (default: that of the profile)"
    parser.add_argument("--data", default="", metavar="DIR", help=help_text)
    help_text = "steps: number of steps after the warm-up"
    parser.add_argument("--steps", type=int, default=20, help=help_text)
    add_memory_arguments(parser)
    return parser.parse_args()


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the part `memory`."""
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="memory: examples per batch",
    )
    parser.add_argument(
        "--segments",
        nargs="+",
        type=float,
        default=[3, 6, 12],
        metavar="S",
        help="memory: segments (s)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=int,
        default=[16000, 22050, 44100],
        metavar="HZ",
        help="memory: sample rates (Hz)",
    )
    parser.add_argument(
        "--figure", default="results/memory.png", metavar="FILE", help="memory: path of the figure"
    )
    # used by this script only: `measure_peak_mb` starts a process of its own for each measurement
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """Yield a temporary folder that holds an empty cache, so that no earlier result is used."""
    before = os.environ.get("MSS_CACHE", "")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSS_CACHE"] = f"{folder}/cache"
        yield Path(folder)
    os.environ["MSS_CACHE"] = before


def print_table(title: str, table: pd.DataFrame) -> None:
    """Print a Markdown table below its title and a description of the machine."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"\n{title} ({os.cpu_count()} cores{gpu}, torch {torch.__version__}):\n")
    for row in (table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)):
        print("|", " | ".join(map(format_cell, row)), "|", flush=True)


def format_cell(value: object) -> str:
    """Round a float to three significant digits, or to an integer from 100 on; "-" for NaN."""
    if pd.isna(value):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_settings(settings: Settings) -> str:
    """Describe the profile and the size of a batch."""
    size = f"{settings.batch_size} x {settings.segment_s:g} s at {settings.sample_rate} Hz"
    return f"{settings.profile}: {size}, channels {settings.channels}, {settings.precision}"


# --- decoding -------------------------------------------------------------------------------------


def link_tracks(root: Path, count: int, subset: Path) -> Path:
    """Make a dataset of symbolic links to about `count` tracks at equal distances; 0 for all."""
    sources = find_tracks(root)
    for source in sources[:: max(1, len(sources) // count)] if count else sources:
        (subset / source.split).mkdir(parents=True, exist_ok=True)
        (subset / source.split / source.path.name).symlink_to(source.path.resolve())
    return subset


def measure_decoding(root: Path, count: int, folder: Path) -> pd.DataFrame:
    """Decode tracks with musdb one by one, and twice into a stem store (16 kHz mono).

    Parameters
    ----------
    root : Path
        MUSDB18 folder of stem files.
    count : int
        Approximate number of tracks, taken at equal distances; 0 for all.
    folder : Path
        Empty folder for links to the tracks.

    Returns
    -------
    DataFrame
        One row per way of decoding: seconds, number of tracks, seconds of audio per second, and how
        many times as fast as musdb.
    """
    subset = link_tracks(root, count, folder / root.name)
    sources = find_tracks(subset)
    import musdb

    def decode_with_musdb() -> None:
        for source in sources:
            _ = musdb.MultiTrack(path=str(source.path), name=source.name, stem_id=0).stems

    seconds = [
        measure_seconds(decode_with_musdb),
        measure_seconds(build_store, subset, 16000, 1),
        measure_seconds(build_store, subset, 16000, 1),
    ]
    store = build_store(subset, 16000, 1)
    music_s = sum(track.samples for track in store.tracks) / store.sample_rate
    ways = ["musdb, one after the other", "stem store, first call", "stem store, second call"]
    table = pd.DataFrame({"way": ways, "seconds": seconds})
    return table.assign(
        tracks=len(sources),
        audio_s_per_s=music_s / table["seconds"],
        times_musdb=seconds[0] / table["seconds"],
    )


# --- loading --------------------------------------------------------------------------------------


def write_noise_dataset(root: Path, n_tracks: int = 8, seconds: int = 60) -> Path:
    """Write tracks of noise in the layout of MUSDB18-HQ: 44.1 kHz, stereo, 16 bits."""
    rng = np.random.default_rng(0)
    for index, split in enumerate(["train"] * n_tracks + ["valid", "test"]):
        folder = root / split / f"Nobody - Noise {index}"
        folder.mkdir(parents=True)
        stems = rng.integers(-3000, 3000, (len(MUSDB_STEMS), seconds * 44100, 2), dtype=np.int16)
        for name, audio in zip(
            ("mixture", *MUSDB_STEMS), (stems.sum(axis=0, dtype=np.int16), *stems), strict=True
        ):
            soundfile.write(folder / f"{name}.wav", audio, 44100, subtype="PCM_16")
    return root


def measure_loading(root: Path, n_batches: int) -> pd.DataFrame:
    """Compare the speed of data loaders with the speed of training B1 on a CPU.

    Batches have 16 segments of 8 s, 44.1 kHz stereo.

    Parameters
    ----------
    root : Path
        Dataset in the layout of MUSDB18-HQ.
    n_batches : int
        From each of our loaders; a tenth of it from open-unmix's loaders, which are slower.

    Returns
    -------
    DataFrame
        One row per loader, and one for training: seconds of audio, batches and MB per second, and
        how many times as fast as training.
    """
    settings = resolve_settings("demo", str(root), "vocals", LOADING_SETTINGS)
    mixer = Mixer(open_store(settings), settings, "vocals")
    rows = {"training B1 consumes": training_rate(mixer)}
    rows["our loader: int16 segments"] = loader_rate(mixer.draws(0, n_batches))
    rows["our loader, assembled on the CPU"] = loader_rate(mixer.batches(0, n_batches))
    rows |= {
        name: loader_rate(itertools.islice(loader, max(2, n_batches // 10)))
        for name, loader in open_unmix_loaders(root)
    }
    table = pd.DataFrame({"what": rows.keys(), "audio_s_per_s": rows.values()})
    rates = table["audio_s_per_s"]
    return table.assign(
        batches_per_s=rates / BATCH_S,
        mb_per_s=rates / BATCH_S * BATCH_MB,
        times_training=rates / rates[0],
    )


def loader_rate(batches: Iterable) -> float:
    """Measure seconds of audio per second, without the first batch: loaders start up in it."""
    batches = iter(batches)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH_S / (time.perf_counter() - started)


def training_rate(mixer: Mixer, n_steps: int = 3) -> float:
    """Measure seconds of audio per second when B1 trains on one batch in memory."""
    step = make_train_step(Fabric(accelerator="cpu", devices=1), "demucs_lstm", mixer.settings)
    batch = mixer.batch(0)
    step(batch)
    return n_steps * BATCH_S / measure_seconds(lambda: [step(batch) for _ in range(n_steps)])


def open_unmix_loaders(root: Path) -> Iterator[tuple[str, Iterable]]:
    """Yield name and DataLoader of open-unmix's two datasets on the same WAV files.

    open-unmix reads files with torchaudio.load, which needs TorchCodec in current versions;
    soundfile replaces it here.
    """
    try:
        from openunmix import data
    except ImportError:
        print(
            "open-unmix is not installed; its loaders are skipped. To measure them: "
            "pip install --no-deps -r benchmarks/requirements.txt"
        )
        return
    data.load_info = lambda path: dict(samplerate=44100, duration=soundfile.info(path).duration)
    data.load_audio = _load_audio
    augmentations = data.aug_from_str(["gain", "channelswap"])
    common = dict(
        root=str(root), seq_duration=8.0, random_track_mix=True, source_augmentations=augmentations
    )
    files = dict(target_file="vocals.wav", interferer_files=["bass.wav", "drums.wav", "other.wav"])
    datasets = {
        "open-unmix, MUSDB18-HQ through musdb": data.MUSDBDataset(is_wav=True, **common),
        "open-unmix, track folders": data.FixedSourcesTrackFolderDataset(
            random_chunks=True, **files, **common
        ),
    }
    for name, dataset in datasets.items():
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
        yield (
            name,
            torch.utils.data.DataLoader(dataset, batch_size=16, sampler=sampler, num_workers=2),
        )


def _load_audio(path, start=0.0, dur=None, info=None):
    """Replace `openunmix.data.load_audio`, with the same arguments."""
    frames = -1 if dur is None else round(dur * 44100)
    audio, rate = soundfile.read(
        path, frames, round(start * 44100), dtype="float32", always_2d=True
    )
    return torch.from_numpy(audio.T), rate


# --- steps ----------------------------------------------------------------------------------------


def measure_steps(settings: Settings, n_steps: int) -> pd.DataFrame:
    """Measure the parts of a training step of each model, with real batches.

    On a GPU the times come from events in its queue, and the loop runs as in a training: loading
    overlaps with computing. A part that waits until the CPU launches it includes this wait.

    Parameters
    ----------
    settings : Settings
    n_steps : int
        Number of steps after the warm-up.

    Returns
    -------
    DataFrame
        One row per model with mean seconds of

        - `data_s`: from the end of a step until the next batch is on the device: wait for the
          loader, transfer, assembly
        - `forward_s`: forward pass and loss
        - `backward_s`
        - `optimiser_s`: gradient clipping, AdamW, EMA of the weights
        - `step_s`: the sum

        and `audio_s_per_s`, seconds of audio per second; `computing`, the share of a step that is
        not data.
    """
    store = open_store(settings)
    mixer = Mixer(store, settings, store.stems[0] if settings.target == "all" else settings.target)
    table = pd.DataFrame(
        [dict(model=name) | measure_parts(name, mixer, n_steps) for name in MODELS]
    )
    step_s = table.drop(columns="model").sum(axis=1)
    audio_s_per_s = settings.batch_size * settings.segment_s / step_s
    return table.assign(
        step_s=step_s, audio_s_per_s=audio_s_per_s, computing=1 - table["data_s"] / step_s
    )


def measure_parts(name: str, mixer: Mixer, n_steps: int) -> dict[str, float]:
    """Measure mean seconds of each part of a step."""
    settings, fabric = mixer.settings, TimingFabric(mixer.settings)
    step = make_train_step(fabric, name, settings)
    n_warm_up = settings.loader_workers + 3  # more batches than the loader reads ahead
    first = settings.stage3_step  # from this step on the curriculum mixes all sources
    fabric.mark()
    for batch in mixer.batches(first, first + n_warm_up + n_steps, fabric.device):
        fabric.mark()
        step(batch)
        fabric.mark()
    seconds = fabric.seconds().reshape(-1, 4)[n_warm_up:].mean(axis=0)
    return dict(zip(("data_s", "forward_s", "backward_s", "optimiser_s"), seconds, strict=True))


class TimingFabric(Fabric):
    """A Fabric that records when forward and backward end, to time the real training step.

    On a GPU a mark is a CUDA event: the loop does not wait for it, and the time between two marks
    is time on the GPU.
    """

    def __init__(self, settings: Settings):
        super().__init__(accelerator=settings.device, devices=1, precision=settings.precision)
        self.marks = []

    def backward(self, *args, **options) -> None:
        """Run the backward pass between two marks."""
        self.mark()
        super().backward(*args, **options)
        self.mark()

    def mark(self) -> None:
        """Record the current time."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> np.ndarray:
        """Return the seconds between each mark and the next, `(marks - 1,)`."""
        if self.device.type != "cuda":
            return np.diff(self.marks)
        torch.cuda.synchronize()
        return np.array([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self.marks)])


def make_train_step(fabric: Fabric, name: str, settings: Settings) -> Callable[[Batch], None]:
    """Build a model; return a function that trains it on a batch for one step."""
    recipe = build_recipe(name, settings)
    model, optimizer = setup_optimizer(fabric, recipe)
    average = copy_network(recipe.network)

    def step(batch: Batch) -> None:
        train_step(fabric, model, optimizer, recipe, batch, recipe.lr)
        update_ema(average, recipe.network, settings.ema_decay)

    return step


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(
    settings: Settings,
    batch_sizes: list[int],
    segments_s: list[float],
    rates: list[int],
    figure: Path,
) -> None:
    """Print peak memory of a step in two tables, and plot the second.

    The first table has all models by batch size and segment, the second B1 and B2 by sample rate
    and segment.
    """
    grid = settings_grid(settings, batch_size=batch_sizes, segment_s=segments_s)
    table = pd.concat([measure_peaks(name, grid) for name in MODELS])
    shared = f"{settings.profile}, channels {settings.channels}, {settings.precision}"
    print_table(
        f"Peak memory of a step in MB, {shared}, {settings.sample_rate} Hz",
        by_segment(table, "batch_size"),
    )
    grid = settings_grid(settings, segment_s=segments_s, sample_rate=rates)
    table = pd.concat([measure_peaks(name, grid) for name in ("demucs_lstm", "demucs_attention")])
    print_table(
        f"Peak memory of a step in MB, {shared}, batches of {settings.batch_size}",
        by_segment(table, "sample_rate"),
    )
    plot_memory(table, figure)


def settings_grid(settings: Settings, **values: list) -> list[Settings]:
    """Return copies of the settings with every combination of `values`."""
    return [
        settings.model_copy(update=dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def measure_peaks(name: str, grid: Iterable[Settings]) -> pd.DataFrame:
    """Measure the peak memory of a model's training step for each of the settings.

    Memory is about proportional to the samples of a batch. The next smaller batch therefore
    predicts the memory of a step; a step that is too large is not run.

    Returns
    -------
    DataFrame
        Columns model, batch_size, sample_rate, segment_s, and mb, which is NaN if the step was not
        run or ran out of memory.
    """
    rows, mb_per_sample = [], 0.0
    for settings in sorted(grid, key=batch_samples):
        expected_mb = mb_per_sample * batch_samples(settings)
        # False for NaN: after a step that did not fit, larger ones are not run
        fits = expected_mb <= MAX_MEMORY_SHARE * free_mb(settings)
        mb = measure_peak_mb(name, settings) if fits else np.nan
        mb_per_sample = mb / batch_samples(settings)
        rows.append(
            settings.model_dump(include={"batch_size", "sample_rate", "segment_s"})
            | dict(model=name, mb=mb)
        )
    return pd.DataFrame(rows)


def batch_samples(settings: Settings) -> int:
    """Return the number of samples of a batch in one channel."""
    return settings.batch_size * settings.segment


def free_mb(settings: Settings) -> float:
    """Return the free memory in MB; on a GPU, free the memory of the previous step first."""
    if on_gpu(settings):
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 2**20
    return psutil.virtual_memory().available / 2**20


def measure_peak_mb(name: str, settings: Settings) -> float:
    """Measure the peak memory of a training step in MB.

    It includes weights, their EMA, gradients, moments of AdamW, batch and activations. On a GPU it
    is the largest amount that torch allocated; on a CPU, the growth of a separate process.

    Returns
    -------
    float
        NaN if the step ran out of memory; on a CPU the system then kills the separate process.
    """
    if on_gpu(settings):
        reset_peak_memory(settings)
        try:
            run_two_steps(name, settings)
        except torch.OutOfMemoryError:
            return np.nan
        return peak_memory_mb(settings)
    command = [sys.executable, __file__, "--measure", name, settings.model_dump_json()]
    environment = os.environ | MALLOC_THRESHOLDS
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if process.returncode == -signal.SIGKILL:
        return np.nan
    process.check_returncode()
    return float(process.stdout)


def measure_memory_growth_mb(name: str, settings: Settings) -> float:
    """Measure the growth of this process in MB during two steps, in one thread.

    A small network runs first, because libraries are loaded on their first use. The peak comes from
    /proc, where it can be reset: `ru_maxrss` starts at the peak of the parent process.
    """
    torch.set_num_threads(1)
    small = f"device=cpu batch_size=1 segment_s=0.2 precision={settings.precision}"
    run_two_steps(name, resolve_settings("smoke", overrides=small))
    before = resident_mb("VmRSS")
    reset_peak_memory(settings)
    run_two_steps(name, settings)
    return resident_mb("VmHWM") - before


def run_two_steps(name: str, settings: Settings) -> None:
    """Run two training steps on noise: AdamW's moments do not exist yet in the first."""
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    step = make_train_step(fabric, name, settings)
    stems = torch.randn(
        settings.batch_size, 4, settings.channels, settings.segment, device=fabric.device
    )
    batch = Batch(stems.sum(dim=1), stems[:, 0], stems)
    for _ in range(2):
        step(batch)


def by_segment(table: pd.DataFrame, rows: str) -> pd.DataFrame:
    """Pivot the table: one row per model and value of `rows`, one column per segment, in MB."""
    wide = (
        table.set_index(["model", rows, "segment_s"])["mb"]
        .unstack("segment_s")
        .reindex(table["model"].unique(), level=0)
    )
    return wide.rename(columns="{:g} s".format).reset_index()


def plot_memory(table: pd.DataFrame, path: Path) -> None:
    """Plot GB against the segment in s: one panel per model, one line per sample rate."""
    import matplotlib.pyplot as plt  # here: the measuring processes do not need it

    from mss_utils.figures import style

    fig, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 2.6), layout="constrained", sharey=True)
    for ax, (model, rows) in zip(axes, table.dropna().groupby("model", sort=False), strict=False):
        for rate, line in rows.groupby("sample_rate"):
            gb = line["mb"].to_numpy() / 1024
            ax.plot(line["segment_s"], gb, **style.look(model))
            end = line["segment_s"].iloc[-1], gb[-1]
            ax.annotate(
                f"{rate / 1000:g} kHz",
                end,
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        ax.set(
            title=style.LABELS[model],
            xlabel="training segment (s)",
            xticks=sorted(table["segment_s"].unique()),
        )
        ax.set_xlim(0, 1.3 * table["segment_s"].max())
    axes[0].set(ylabel=f"peak memory of a step,\nbatches of {table['batch_size'].iloc[0]} (GB)")
    axes[0].set_ylim(bottom=0)
    with atomic_write(path) as part:
        fig.savefig(part, dpi=150)


def measure_seconds(function: Callable, *arguments) -> float:
    """Call the function; return the seconds that it took."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
