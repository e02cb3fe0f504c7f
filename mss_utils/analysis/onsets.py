"""When things happen in a track: onsets of a stem, length of a beat and of a bar.

The built-in songs know theirs, `onsets.json` and `song.json` lie beside their stems; elsewhere librosa listens.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import librosa
import numpy as np

from mss_utils.data import Store, Track

HOP_S = 0.004  # of the detectors
WINDOW_S = 0.064
RISE_S = 0.05
BEATS_IN_A_BAR = 4  # where nobody says: most popular music


def find_onsets(store: Store, track: Track, stem: str) -> np.ndarray:
    """Onsets of a stem in seconds, sorted: those of the score, else those that librosa finds in the reference.

    A detected onset is moved back to where the sound begins to rise, so that what comes before it is before the attack, and kept
    if the 50 ms after it have twice the power of the 50 ms before. Of what is found so in the built-in validation songs, all is within
    30 ms of a true onset on drums and piano, and 9 in 10 on vocals; a fourth to two thirds of the true ones are missed.
    """
    written = _written(track, "onsets.json")
    if (
        set(store.stems) == written.keys()
    ):  # stems that were added up have onsets of several players
        return np.asarray(written[stem])
    _, stems = store.load(track)
    audio = stems[store.stem_index(stem)]
    strength, hop = onset_strength(audio, store.sample_rate)
    found = (
        librosa.onset.onset_detect(
            onset_envelope=strength, sr=store.sample_rate, hop_length=hop, backtrack=True
        )
        * hop
    )
    return found[_rises(audio, found, round(RISE_S * store.sample_rate))] / store.sample_rate


def onset_strength(audio: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """Onset strength of `(channels, samples)`, `(frames,)`, and the hop between frames in samples, 4 ms.

    The SuperFlux of S. Boeck and G. Widmer, "Maximum filter vibrato suppression for onset detection", DAFx 2013.
    """
    hop = int(HOP_S * sample_rate)
    n_fft = 2 ** round(np.log2(WINDOW_S * sample_rate))
    mono = audio.mean(axis=0)
    return librosa.onset.onset_strength(
        y=mono, sr=sample_rate, hop_length=hop, n_fft=n_fft, n_mels=80, lag=2, max_size=3
    ), hop


def _rises(audio: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    """At which of these samples the next `length` samples of `(channels, samples)` have twice the energy of those before."""
    sums = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64).mean(axis=0))])
    until = lambda sample: sums[np.clip(sample, 0, len(sums) - 1)]
    return until(at + length) - until(at) > 2 * (until(at) - until(at - length))


@lru_cache(maxsize=1024)  # asked for every stem and seed
def beat_and_bar_s(store: Store, track: Track) -> tuple[float, float]:
    """Seconds of a beat and of a bar; without a score, librosa's tempo and four beats a bar; NaN where no beat is found."""
    written = _written(track, "song.json")
    if written:
        return 60 / written["tempo_bpm"], written["bar_s"]
    mixture, _ = store.load(track)
    strength, hop = onset_strength(mixture, store.sample_rate)
    tempo = float(
        np.ravel(
            librosa.feature.tempo(onset_envelope=strength, sr=store.sample_rate, hop_length=hop)
        )[0]
    )
    beat_s = 60 / tempo if strength.any() and tempo > 0 else np.nan
    return beat_s, BEATS_IN_A_BAR * beat_s


def _written(track: Track, name: str) -> dict:
    path = Path(track.source) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
