"""Training batches, mixed on the fly: stems of different songs, random gains, and a curriculum of more and more sources.

A batch is a pure function of (seed, step): every model of a run sees the same batches in the same order, and a resumed
training goes on with the batch it would have had. Taught in notebook 01.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from mss_utils.data import SILENCE_DB, Store, level_db
from mss_utils.settings import Settings

MAX_TRIES = 20


@dataclass(frozen=True)
class Batch:
    """`mixture` and `target` are `(batch, channels, samples)`; `stems` `(batch, stems, channels, samples)` sum to the mixture."""

    mixture: torch.Tensor
    target: torch.Tensor
    stems: torch.Tensor


class Mixer:
    """Draws the training batches of one target from the training tracks of a store.

    Raises ValueError when no training track is as long as a segment.
    """

    def __init__(self, store: Store, settings: Settings, target: str, seed: int = 0):
        self.store, self.settings, self.seed = store, settings, seed
        self.target = store.stem_index(target)
        self.tracks = [track for track in store.split("train") if track.samples >= settings.segment]
        if not self.tracks:
            longest = max(track.samples for track in store.split("train")) / store.sample_rate
            raise ValueError(f"No training track lasts segment_s={settings.segment_s} s; the longest has {longest:.1f} s: set segment_s lower.")
        self._audio = [store.raw(track) for track in self.tracks]

    def batch(self, step: int) -> Batch:
        """The batch of training step `step`, always the same for the same seed and step."""
        rng = np.random.default_rng([self.seed, step])
        stems = np.stack([self.example(rng, step) for _ in range(self.settings.batch_size)])
        mixture = stems.sum(axis=1)
        return Batch(*map(torch.from_numpy, (mixture, stems[:, self.target], stems)))

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` up to, not including, `last`; the next one is mixed while the caller computes."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.batch, first)
            for step in range(first, last):
                batch = coming.result()
                if step + 1 < last:
                    coming = pool.submit(self.batch, step + 1)
                yield batch

    def example(self, rng: np.random.Generator, step: int) -> np.ndarray:
        """Stems of one example, `(stems, channels, samples)`; those that the curriculum leaves out are silent."""
        coherent = not self.settings.random_mix or rng.random() < self.settings.coherent_share
        first, start = self._draw_target(rng)
        stems = np.zeros((len(self.store.stems), self.settings.channels, self.settings.segment), np.float32)
        for stem in [self.target, *self._draw_distractors(rng, step)]:
            song, position = (first, start) if coherent or stem == self.target else self._draw_position(rng)
            stems[stem] = self._augment(self._cut(song, stem, position), rng)
        return stems

    def stage(self, step: int) -> int:
        """Curriculum stage at `step`: 1 is target plus one source, 2 three sources, 3 all of them."""
        if not self.settings.curriculum:
            return 3
        return 1 + (step >= self.settings.stage2_step) + (step >= self.settings.stage3_step)

    def _draw_distractors(self, rng: np.random.Generator, step: int) -> np.ndarray:
        others = [stem for stem in range(len(self.store.stems)) if stem != self.target]
        stage = self.stage(step)
        return rng.permutation(others)[: len(others) if stage == 3 else stage]

    def _draw_target(self, rng: np.random.Generator) -> tuple[int, int]:
        """Song and position of a segment; where the target is silent it is drawn again, but for `silent_share`."""
        keep_silent = rng.random() < self.settings.silent_share
        for _ in range(MAX_TRIES):
            song, position = self._draw_position(rng)
            if keep_silent or level_db(self._cut(song, self.target, position)) > SILENCE_DB:
                break
        return song, position

    def _draw_position(self, rng: np.random.Generator) -> tuple[int, int]:
        song = int(rng.integers(len(self.tracks)))
        return song, int(rng.integers(self.tracks[song].samples - self.settings.segment + 1))

    def _cut(self, song: int, stem: int, start: int) -> np.ndarray:
        """`(channels, samples)` float32 of one stem; row 0 of the store is the mixture, so stems start at row 1."""
        raw = self._audio[song][1 + stem, :, start : start + self.settings.segment]
        return raw.astype(np.float32) * np.float32(self.tracks[song].scale)

    def _augment(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        gain_db = rng.uniform(-1, 1) * self.settings.gain_db
        flip, swap = rng.random(2) < 0.5
        sign = -1.0 if flip and self.settings.flip_polarity else 1.0
        audio = audio[::-1] if swap and self.settings.swap_channels else audio
        return audio * np.float32(sign * 10 ** (gain_db / 20))
