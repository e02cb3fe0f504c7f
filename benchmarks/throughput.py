"""What a training step costs, in time and memory, and how fast data come.

    decoding   tracks a second: musdb read in order, against the stem store
    loading    audio a second: our loader and open-unmix's, against what training consumes
    steps      where the time of a training step goes: data, forward, backward, optimiser
    memory     peak memory of a step by batch, segment and sample rate: two tables and a figure

    python benchmarks/throughput.py [--part steps memory] [--profile demo] [--set key=value ...]
                                    [--data DIR] [--musdb DIR]

(make bench installs open-unmix and runs all parts.) Tables are Markdown. Every rate is in seconds
of audio a second: for decoding, of tracks; for the rest, of training segments, whose stems all come
along. Files are read from the page cache. Steps and memory are of the settings' device, a CUDA GPU
if there is one. Compare figures of one run only, on an otherwise idle machine.
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
SETTINGS = "sample_rate=44100 channels=2 segment_s=8 batch_size=16 curriculum=false"  # of loading
BATCH_S = 8 * 16
BATCH_MB = BATCH_S * len(MUSDB_STEMS) * 2 * 2 * 44100 / 1e6  # as int16
GIVING_BACK = dict(
    MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"
)  # glibc keeps nothing that was freed
FREE_SHARE = 0.6  # of the free memory; a step that is expected to need more is not tried


def main() -> None:
    given = arguments()
    if given.measure:
        name, settings = given.measure
        print(peak_of_this_process_mb(name, Settings.model_validate_json(settings)))
        return
    settings = resolve_settings(given.profile, given.data, "", given.set)
    if "decoding" in given.part and not given.musdb:
        print(
            "Decoding is left out: name a MUSDB18 folder of stem files with --musdb or MUSDB_PATH."
        )
    elif "decoding" in given.part:
        with fresh_cache() as folder:
            show("Decoding", decoding(expand_path(given.musdb), given.tracks, folder))
    if "loading" in given.part:
        with fresh_cache() as folder:
            show("Loading", loading(write_hq(folder / "hq"), given.batches))
    if "steps" in given.part:
        show(f"A training step, {in_words(settings)}", steps(settings, given.steps))
    if "memory" in given.part:
        show_memory(
            settings, given.batch_sizes, given.segments, given.rates, expand_path(given.figure)
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)"
    )
    stem_files = os.environ.get("MUSDB_PATH", "")
    parser.add_argument(
        "--musdb",
        default=stem_files,
        metavar="DIR",
        help="decoding: stem files (default: MUSDB_PATH)",
    )
    parser.add_argument(
        "--tracks", type=int, default=0, help="decoding: this many tracks only (default: all)"
    )
    parser.add_argument(
        "--batches", type=int, default=40, help="loading: batches that each loader hands over"
    )
    parser.add_argument("--profile", default="demo", help="steps, memory: whose settings")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="steps, memory: settings of one's own",
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="steps: dataset (default: the profile's own)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps: how many, after a warm-up")
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="memory: examples",
    )
    parser.add_argument(
        "--segments", nargs="+", type=float, default=[3, 6, 12], metavar="S", help="memory: seconds"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=int,
        default=[16000, 22050, 44100],
        metavar="HZ",
        help="memory: sample rates",
    )
    parser.add_argument(
        "--figure", default="results/memory.png", metavar="FILE", help="memory: where to draw it"
    )
    parser.add_argument(
        "--measure", nargs=2, help=argparse.SUPPRESS
    )  # what this script asks of itself, see `peak_mb`
    return parser.parse_args()


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """Yield a folder with an empty cache, removed in the end: nothing is made beforehand."""
    before = os.environ.get("MSS_CACHE", "")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSS_CACHE"] = f"{folder}/cache"
        yield Path(folder)
    os.environ["MSS_CACHE"] = before


def show(title: str, table: pd.DataFrame) -> None:
    """Print a Markdown table below its title and the machine it was made on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"\n{title} ({os.cpu_count()} cores{gpu}, torch {torch.__version__}):\n")
    for row in (table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)):
        print("|", " | ".join(map(in_cell, row)), "|", flush=True)


def in_cell(value: object) -> str:
    """Three digits of a number, more only in front of the point; "-" where there is none."""
    if pd.isna(value):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def in_words(settings: Settings) -> str:
    """Profile and size of a batch."""
    size = f"{settings.batch_size} x {settings.segment_s:g} s at {settings.sample_rate} Hz"
    return f"{settings.profile}: {size}, channels {settings.channels}, {settings.precision}"


# --- decoding -------------------------------------------------------------------------------------


def decoding(root: Path, count: int, folder: Path) -> pd.DataFrame:
    """Decode all tracks: with musdb in order, and into a stem store (16 kHz mono), twice."""
    subset = folder / root.name
    sources = find_tracks(root)
    for source in sources[:: max(1, len(sources) // count)] if count else sources:
        (subset / source.split).mkdir(parents=True, exist_ok=True)
        (subset / source.split / source.path.name).symlink_to(source.path.resolve())
    sources = find_tracks(subset)
    import musdb  # as anybody would, before the store's own import of it

    def in_order():
        for source in sources:
            _ = musdb.MultiTrack(path=str(source.path), name=source.name, stem_id=0).stems

    seconds = [
        timed(in_order),
        timed(build_store, subset, 16000, 1),
        timed(build_store, subset, 16000, 1),
    ]
    store = build_store(subset, 16000, 1)
    music_s = sum(track.samples for track in store.tracks) / store.sample_rate
    table = pd.DataFrame(
        {
            "way": [
                "musdb, one after the other",
                "stem store, first call",
                "stem store, second call",
            ],
            "seconds": seconds,
        }
    )
    return table.assign(
        tracks=len(sources),
        audio_s_per_s=music_s / table["seconds"],
        times_musdb=seconds[0] / table["seconds"],
    )


# --- loading --------------------------------------------------------------------------------------


def write_hq(root: Path, n_tracks: int = 8, seconds: int = 60) -> Path:
    """Write noise in the layout of MUSDB18-HQ: 44.1 kHz, stereo, 16 bits."""
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


def loading(root: Path, n_batches: int) -> pd.DataFrame:
    """Compare what loaders deliver and B1 consumes: 16 segments of 8 s, 44.1 kHz stereo."""
    settings = resolve_settings("demo", str(root), "vocals", SETTINGS)
    mixer = Mixer(open_store(settings), settings, "vocals")
    rows = {"training B1 consumes": training_rate(mixer)}
    rows["our loader: int16 segments"] = loader_rate(mixer.draws(0, n_batches))
    rows["our loader, assembled on the CPU"] = loader_rate(mixer.batches(0, n_batches))
    rows |= {
        name: loader_rate(itertools.islice(loader, max(2, n_batches // 10)))
        for name, loader in open_unmix(root)
    }
    table = pd.DataFrame({"what": rows.keys(), "audio_s_per_s": rows.values()})
    rates = table["audio_s_per_s"]
    return table.assign(
        batches_per_s=rates / BATCH_S,
        mb_per_s=rates / BATCH_S * BATCH_MB,
        times_training=rates / rates[0],
    )


def loader_rate(batches) -> float:
    """Audio seconds a second after the first batch, in which loaders start up."""
    batches = iter(batches)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH_S / (time.perf_counter() - started)


def training_rate(mixer: Mixer, n_steps: int = 3) -> float:
    """Of B1 with the settings of the demo, on one batch that is there already."""
    step = stepper(Fabric(accelerator="cpu", devices=1), "demucs_lstm", mixer.settings)
    batch = mixer.batch(0)
    step(batch)
    return n_steps * BATCH_S / timed(lambda: [step(batch) for _ in range(n_steps)])


def open_unmix(root: Path):
    """Time open-unmix's own loaders on the same WAV files: through musdb, and track folders.

    Its track folders are read by torchaudio.load, which asks for TorchCodec by now: soundfile
    stands in for it.
    """
    try:
        from openunmix import data
    except ImportError:
        print(
            "open-unmix is not installed, its loaders are left out: "
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
    frames = -1 if dur is None else round(dur * 44100)
    audio, rate = soundfile.read(
        path, frames, round(start * 44100), dtype="float32", always_2d=True
    )
    return torch.from_numpy(audio.T), rate


# --- steps ----------------------------------------------------------------------------------------


def steps(settings: Settings, n_steps: int) -> pd.DataFrame:
    """Measure seconds of a training step of each model, by part, with real batches.

    Data is the time on the device from the end of a step until the next batch is there:
    waiting for the loader, transfer, assembling. Forward goes as far as the loss; optimiser is
    clipping, AdamW, and the running average of the weights. `computing` is the share of a step that
    is not data. On a GPU all of it is seen in its own queue while the loop runs as in a training,
    so loading overlaps; a part that waits for the CPU to launch it includes that wait.
    """
    store = open_store(settings)
    mixer = Mixer(store, settings, store.stems[0] if settings.target == "all" else settings.target)
    table = pd.DataFrame([dict(model=name) | step_parts(name, mixer, n_steps) for name in MODELS])
    step_s = table.drop(columns="model").sum(axis=1)
    audio_s_per_s = settings.batch_size * settings.segment_s / step_s
    return table.assign(
        step_s=step_s, audio_s_per_s=audio_s_per_s, computing=1 - table["data_s"] / step_s
    )


def step_parts(name: str, mixer: Mixer, n_steps: int) -> dict[str, float]:
    """Return mean seconds of each part of a step; the warm-up is longer than the read-ahead."""
    settings, fabric = mixer.settings, MarkingFabric(mixer.settings)
    step, n_warm_up = stepper(fabric, name, settings), settings.loader_workers + 3
    first = settings.stage3_step  # from which on all sources are read
    fabric.mark()
    for batch in mixer.batches(first, first + n_warm_up + n_steps, fabric.device):
        fabric.mark()
        step(batch)
        fabric.mark()
    seconds = fabric.seconds().reshape(-1, 4)[n_warm_up:].mean(axis=0)
    return dict(zip(("data_s", "forward_s", "backward_s", "optimiser_s"), seconds, strict=True))


class MarkingFabric(Fabric):
    """A Fabric that marks where forward and backward end: the real training step is measured.

    On a GPU a mark is an event in its queue: the loop does not wait for it, and the time between
    two marks has passed on the GPU.
    """

    def __init__(self, settings: Settings):
        super().__init__(accelerator=settings.device, devices=1, precision=settings.precision)
        self.marks = []

    def backward(self, *args, **options) -> None:
        self.mark()
        super().backward(*args, **options)
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> np.ndarray:
        """Between each mark and the next."""
        if self.device.type != "cuda":
            return np.diff(self.marks)
        torch.cuda.synchronize()
        return np.array([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self.marks)])


def stepper(fabric: Fabric, name: str, settings: Settings) -> Callable[[Batch], None]:
    """Return a function that makes one training step of a new model."""
    recipe = build_recipe(name, settings)
    model, optimizer = setup_optimizer(fabric, recipe)
    average = copy_network(recipe.network)

    def step(batch: Batch) -> None:
        train_step(fabric, model, optimizer, recipe, batch, recipe.lr)
        update_ema(average, recipe.network, settings.ema_decay)

    return step


# --- memory ---------------------------------------------------------------------------------------


def show_memory(
    settings: Settings,
    batch_sizes: list[int],
    segments_s: list[float],
    rates: list[int],
    figure: Path,
) -> None:
    """Tabulate peak MB of a step by batch and segment, and by sample rate (also drawn)."""
    grid = variants(settings, batch_size=batch_sizes, segment_s=segments_s)
    table = pd.concat([peaks(name, grid) for name in MODELS])
    shared = f"{settings.profile}, channels {settings.channels}, {settings.precision}"
    show(
        f"Peak memory of a step in MB, {shared}, {settings.sample_rate} Hz",
        by_segment(table, "batch_size"),
    )
    grid = variants(settings, segment_s=segments_s, sample_rate=rates)
    table = pd.concat([peaks(name, grid) for name in ("demucs_lstm", "demucs_attention")])
    show(
        f"Peak memory of a step in MB, {shared}, batches of {settings.batch_size}",
        by_segment(table, "sample_rate"),
    )
    draw(table, figure)


def variants(settings: Settings, **values: list) -> list[Settings]:
    """Return the settings with every combination of `values`."""
    return [
        settings.model_copy(update=dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def peaks(name: str, grid: Iterable[Settings]) -> pd.DataFrame:
    """Return columns model, batch_size, sample_rate, segment_s, mb; NaN where memory is short.

    Memory grows about as the samples of a batch do, so a step is expected to need what the next
    smaller one did, times how much larger it is.
    """
    rows, mb_per_sample = [], 0.0
    for settings in sorted(grid, key=samples_of):
        fits = mb_per_sample * samples_of(settings) <= FREE_SHARE * free_mb(
            settings
        )  # never, once it is NaN
        mb = peak_mb(name, settings) if fits else np.nan
        mb_per_sample = mb / samples_of(settings)
        rows.append(
            settings.model_dump(include={"batch_size", "sample_rate", "segment_s"})
            | dict(model=name, mb=mb)
        )
    return pd.DataFrame(rows)


def samples_of(settings: Settings) -> int:
    """Return samples of a batch in one channel."""
    return settings.batch_size * settings.segment


def free_mb(settings: Settings) -> float:
    """Memory in MB that a step could have; what the step before it had is given back first."""
    if on_gpu(settings):
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 2**20
    return psutil.virtual_memory().available / 2**20


def peak_mb(name: str, settings: Settings) -> float:
    """Measure peak MB of a training step: weights, average, gradients, moments, activations.

    On a GPU what torch had allocated at the most; on a CPU by how much a process of its own grew.
    NaN if memory ran out, for which the system kills that process.
    """
    if on_gpu(settings):
        reset_peak_memory(settings)
        try:
            take_steps(name, settings)
        except torch.OutOfMemoryError:
            return np.nan
        return peak_memory_mb(settings)
    command = [sys.executable, __file__, "--measure", name, settings.model_dump_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | GIVING_BACK)
    if done.returncode == -signal.SIGKILL:
        return np.nan
    done.check_returncode()
    return float(done.stdout)


def peak_of_this_process_mb(name: str, settings: Settings) -> float:
    """By how many MB this process grows during two steps, in one thread.

    A small network goes first, since libraries load on their first use. The kernel's own high-water
    mark is set back and read: `ru_maxrss` would begin with what the calling process had used.
    """
    torch.set_num_threads(1)
    take_steps(
        name,
        resolve_settings(
            "smoke",
            overrides=f"device=cpu batch_size=1 segment_s=0.2 precision={settings.precision}",
        ),
    )
    before = resident_mb("VmRSS")
    reset_peak_memory(settings)
    take_steps(name, settings)
    return resident_mb("VmHWM") - before


def take_steps(name: str, settings: Settings) -> None:
    """Make two training steps on noise: in the first, AdamW's moments do not exist yet."""
    fabric = Fabric(accelerator=settings.device, devices=1, precision=settings.precision)
    step = stepper(fabric, name, settings)
    stems = torch.randn(
        settings.batch_size, 4, settings.channels, settings.segment, device=fabric.device
    )
    batch = Batch(stems.sum(dim=1), stems[:, 0], stems)
    for _ in range(2):
        step(batch)


def by_segment(table: pd.DataFrame, rows: str) -> pd.DataFrame:
    """MB of each model: `rows` downwards, seconds of a segment across."""
    wide = (
        table.set_index(["model", rows, "segment_s"])["mb"]
        .unstack("segment_s")
        .reindex(table["model"].unique(), level=0)
    )
    return wide.rename(columns="{:g} s".format).reset_index()


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw GB against seconds of a segment: one panel per model, one line per sample rate."""
    import matplotlib.pyplot as plt  # here, since the processes that measure draw nothing

    from mss_utils import figures

    fig, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.6), layout="constrained", sharey=True)
    for ax, (model, rows) in zip(axes, table.dropna().groupby("model", sort=False), strict=False):
        for rate, line in rows.groupby("sample_rate"):
            gb = line["mb"].to_numpy() / 1024
            ax.plot(
                line["segment_s"], gb, color=figures.COLOURS[model], marker=figures.MARKERS[model]
            )
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
            title=figures.LABELS[model],
            xlabel="training segment (s)",
            xticks=sorted(table["segment_s"].unique()),
        )
        ax.set_xlim(0, 1.3 * table["segment_s"].max())
    axes[0].set(ylabel=f"peak memory of a step,\nbatches of {table['batch_size'].iloc[0]} (GB)")
    axes[0].set_ylim(bottom=0)
    with atomic_write(path) as part:
        fig.savefig(part, dpi=150)


def timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
