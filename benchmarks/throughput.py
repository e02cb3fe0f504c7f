"""How fast data come: decoding against musdb read in order, the loader against what training consumes and against open-unmix.

    python benchmarks/throughput.py [--musdb DIR] [--batches N]         (make bench installs open-unmix and runs this)

Every rate is in seconds of audio a second: for decoding, of tracks; for loading and training, of training segments, whose
stems all come along. Files are read from the page cache. Compare figures of one run only, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from lightning_fabric import Fabric

from mss_utils.data import build_store, find_tracks, open_store
from mss_utils.data.sources import MUSDB_STEMS
from mss_utils.mixing import Mixer
from mss_utils.models import build_model
from mss_utils.settings import from_root, resolve
from mss_utils.training import descend

SETTINGS = "sample_rate=44100 channels=2 segment_s=8 batch_size=16 curriculum=false"
BATCH_S = 8 * 16
BATCH_MB = BATCH_S * len(MUSDB_STEMS) * 2 * 2 * 44100 / 1e6  # as int16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    stem_files = os.environ.get("MUSDB_PATH", "")
    parser.add_argument("--musdb", default=stem_files, metavar="DIR", help="stem files to decode (default: MUSDB_PATH)")
    parser.add_argument("--batches", type=int, default=40, help="batches that each loader hands over")
    parser.add_argument("--tracks", type=int, default=0, help="decode this many tracks only (default: all)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSS_CACHE"] = f"{folder}/cache"
        if given.musdb:
            show("decoding", decoding(from_root(given.musdb), given.tracks, Path(folder)))
        show("loading", loading(write_hq(Path(folder) / "hq"), given.batches))


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(table.to_string(index=False, float_format="{:.2f}".format), flush=True)


def decoding(root: Path, count: int, folder: Path) -> pd.DataFrame:
    """All stems of every track: by musdb one after the other, and into a stem store (16 kHz mono), twice."""
    subset = folder / root.name
    sources = find_tracks(root)
    for source in sources[:: max(1, len(sources) // count)] if count else sources:
        (subset / source.split).mkdir(parents=True, exist_ok=True)
        (subset / source.split / source.path.name).symlink_to(source.path.resolve())
    sources = find_tracks(subset)
    import musdb  # as anybody would, before the store's own import of it

    def in_order():
        for source in sources:
            musdb.MultiTrack(path=str(source.path), name=source.name, stem_id=0).stems

    seconds = [timed(in_order), timed(build_store, subset, 16000, 1), timed(build_store, subset, 16000, 1)]
    store = build_store(subset, 16000, 1)
    music_s = sum(track.samples for track in store.tracks) / store.sample_rate
    table = pd.DataFrame({"way": ["musdb, one after the other", "stem store, first call", "stem store, second call"], "seconds": seconds})
    return table.assign(tracks=len(sources), audio_s_per_s=music_s / table["seconds"], times_musdb=seconds[0] / table["seconds"])


def write_hq(root: Path, n_tracks: int = 8, seconds: int = 60) -> Path:
    """A tree in the form of MUSDB18-HQ that holds noise: 44.1 kHz, stereo, 16 bits."""
    rng = np.random.default_rng(0)
    for index, split in enumerate(["train"] * n_tracks + ["valid", "test"]):
        folder = root / split / f"Nobody - Noise {index}"
        folder.mkdir(parents=True)
        stems = rng.integers(-3000, 3000, (len(MUSDB_STEMS), seconds * 44100, 2), dtype=np.int16)
        for name, audio in zip(("mixture", *MUSDB_STEMS), (stems.sum(axis=0, dtype=np.int16), *stems)):
            soundfile.write(folder / f"{name}.wav", audio, 44100, subtype="PCM_16")
    return root


def loading(root: Path, n_batches: int) -> pd.DataFrame:
    """Batches of 16 segments of 8 s, 44.1 kHz stereo, four stems: what training B1 consumes, what loaders hand over."""
    settings = resolve("demo", str(root), "vocals", SETTINGS)
    mixer = Mixer(open_store(settings), settings, "vocals")
    rows = {"training B1 consumes": training_rate(mixer)}
    rows["our loader: int16 segments"] = loader_rate(mixer.draws(0, n_batches))
    rows["our loader, assembled on the CPU"] = loader_rate(mixer.batches(0, n_batches))
    rows |= {name: loader_rate(itertools.islice(loader, max(2, n_batches // 10))) for name, loader in open_unmix(root)}
    table = pd.DataFrame({"what": rows.keys(), "audio_s_per_s": rows.values()})
    rates = table["audio_s_per_s"]
    return table.assign(batches_per_s=rates / BATCH_S, mb_per_s=rates / BATCH_S * BATCH_MB, times_training=rates / rates[0])


def loader_rate(batches) -> float:
    """Audio seconds a second after the first batch, in which loaders start up."""
    batches = iter(batches)
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH_S / (time.perf_counter() - started)


def training_rate(mixer: Mixer, n_examples: int = 2, n_steps: int = 5) -> float:
    """Of B1 with the settings of the demo. Batches of 2, since 16 would take over 30 GB; audio a second hardly depends on it."""
    fabric = Fabric(accelerator="cpu", devices=1)
    network = build_model("demucs_lstm", mixer.settings)
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    batch = mixer.batch(0)
    step = lambda: descend(fabric, model, optimizer, batch.mixture[:n_examples], batch.target[:n_examples], 5.0)
    step()
    seconds = timed(lambda: [step() for _ in range(n_steps)])
    return n_steps * n_examples * mixer.settings.segment_s / seconds


def open_unmix(root: Path):
    """open-unmix's own loaders on the same WAV files: through musdb, and track folders with its augmentations.

    Its track folders are read by torchaudio.load, which asks for TorchCodec by now: soundfile stands in for it.
    """
    try:
        from openunmix import data
    except ImportError:
        print("open-unmix is not installed, so its loaders are left out: pip install --no-deps -r benchmarks/requirements.txt")
        return
    data.load_info = lambda path: dict(samplerate=44100, duration=soundfile.info(path).duration)
    data.load_audio = _load_audio
    augmentations = data.aug_from_str(["gain", "channelswap"])
    common = dict(root=str(root), seq_duration=8.0, random_track_mix=True, source_augmentations=augmentations)
    files = dict(target_file="vocals.wav", interferer_files=["bass.wav", "drums.wav", "other.wav"])
    datasets = {
        "open-unmix, MUSDB18-HQ through musdb": data.MUSDBDataset(is_wav=True, **common),
        "open-unmix, track folders": data.FixedSourcesTrackFolderDataset(random_chunks=True, **files, **common),
    }
    for name, dataset in datasets.items():
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
        yield name, torch.utils.data.DataLoader(dataset, batch_size=16, sampler=sampler, num_workers=2)


def _load_audio(path, start=0.0, dur=None, info=None):
    frames = -1 if dur is None else round(dur * 44100)
    audio, rate = soundfile.read(path, frames, round(start * 44100), dtype="float32", always_2d=True)
    return torch.from_numpy(audio.T), rate


def timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
