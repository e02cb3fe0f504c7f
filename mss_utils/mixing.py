"""Training batches, mixed on the fly: stems of different songs, random gains, and a curriculum of more and more sources.

    Store --draw--> int16 segments and how to mix them --assemble, on the device--> Batch: the mixture and its stems

A batch is a pure function of (seed, step): every model of a run sees the same batches in the same order, a resumed
training goes on with the batch it would have had, and reading ahead in several threads changes nothing. Taught in
notebook 01.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

import numpy as np
import torch
import torchaudio

from mss_utils.config import Settings
from mss_utils.data import SILENCE_DB, Store, Track, rms

MAX_TRIES = 100  # of finding a segment in which the target sounds; a target that sounds 5 % of the time is missed in 0.6 % of draws
MAX_DENOMINATOR = 32  # four cents off at the most


@dataclass(frozen=True)
class Draw:
    """What a batch is made of, as the loader hands it over: copied (channels swapped on the way), but not yet floats, changed or added up.

    All but `segments` are `(batch, stems)`. A stem that an example leaves out has gain 0.
    """

    segments: (
        torch.Tensor
    )  # int16 (batch, stems, channels, samples); longer than a segment where the speed may change
    gains: torch.Tensor  # float32: from int16 to full scale, gain and polarity in one factor
    semitones: torch.Tensor  # int64: how much higher, and so faster

    def share(self, index: int, count: int) -> Draw:
        """Every `count`-th example from `index` on: what one of several processes takes of a batch."""
        return replace(
            self, **{name: tensor[index::count].contiguous() for name, tensor in vars(self).items()}
        )

    def pinned(self) -> Draw:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in vars(self).items()})

    def to(self, device: torch.device | str) -> Draw:
        """The same on `device`."""
        return replace(
            self,
            **{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()},
        )


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
        self.samples = math.ceil(
            settings.segment * speed_of(settings.speed_semitones)
        )  # to read: playing faster uses up more
        tracks = share_of(store.split("train"), settings.train_share)
        self.tracks = [track for track in tracks if track.samples >= self.samples]
        if not self.tracks:
            longest = max(track.samples for track in tracks) / store.sample_rate
            wanted = f"segment_s={settings.segment_s} s"
            raise ValueError(
                f"No training track lasts {wanted}; the longest has {longest:.1f} s: set segment_s lower."
            )
        self._audio = [store.raw(track) for track in self.tracks]

    def batch(self, step: int, device: torch.device | str = "cpu") -> Batch:
        """The batch of training step `step`, always the same for the same seed and step."""
        return self.assemble(self.draw(step), device)

    def batches(
        self,
        first: int,
        last: int,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """The batches of steps `first` up to, not including, `last`, read ahead and assembled on `device`.

        `share` is (index, count): of `count` processes that train together, each takes its examples of every batch.
        """
        for draw in self.draws(first, last, torch.device(device).type == "cuda", share):
            yield self.assemble(draw, device)

    def draws(
        self, first: int, last: int, pinned: bool = False, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Draw]:
        """The draws of steps `first` up to, not including, `last`; `loader_workers` threads read ahead of the caller."""

        def read(step: int) -> Draw:
            draw = self.draw(step).share(*share)
            return draw.pinned() if pinned else draw

        steps = iter(range(first, last))
        with ThreadPoolExecutor(self.settings.loader_workers) as pool:
            coming = deque(
                pool.submit(read, step) for step in islice(steps, self.settings.loader_workers + 1)
            )
            while coming:
                draw = coming.popleft().result()
                coming.extend(pool.submit(read, step) for step in islice(steps, 1))
                yield draw

    def stage(self, step: int) -> int:
        """Curriculum stage at `step`: 1 is target plus one source, 2 three sources, 3 all of them."""
        if not self.settings.curriculum:
            return 3
        return 1 + (step >= self.settings.stage2_step) + (step >= self.settings.stage3_step)

    # --- drawing: what to read and how to change it, from the random stream of one step

    def draw(self, step: int) -> Draw:
        """Segments of step `step` and how to mix them. Nothing but int16 is copied."""
        rng = np.random.default_rng([self.seed, step])
        shape = self.settings.batch_size, len(self.store.stems)
        segments = np.zeros((*shape, self.store.channels, self.samples), np.int16)
        gains, semitones = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for example in range(self.settings.batch_size):
            coherent = not self.settings.random_mix or rng.random() < self.settings.coherent_share
            together = self._draw_semitones(rng)
            for stem, (song, start) in self._draw_places(rng, step, coherent).items():
                left_to_right = -1 if rng.random() < 0.5 * self.settings.swap_channels else 1
                segments[example, stem] = self._cut(song, stem, start)[::left_to_right]
                gains[example, stem] = self.tracks[song].scale * self._draw_gain(rng)
                semitones[example, stem] = together if coherent else self._draw_semitones(rng)
        return Draw(*map(torch.from_numpy, (segments, gains, semitones)))

    def _draw_places(
        self, rng: np.random.Generator, step: int, coherent: bool
    ) -> dict[int, tuple[int, int]]:
        """Song and position for every stem of one example; those that the curriculum leaves out are missing."""
        silent = rng.random() < self.settings.silent_share
        place = self._draw_target(rng)
        others = self._draw_distractors(rng, step)
        return ({} if silent else {self.target: place}) | {
            stem: place if coherent else self._draw_place(rng) for stem in others
        }

    def _draw_distractors(self, rng: np.random.Generator, step: int) -> list[int]:
        others = [stem for stem in range(len(self.store.stems)) if stem != self.target]
        stage = self.stage(step)
        return rng.permutation(others)[: len(others) if stage == 3 else stage].tolist()

    def _draw_target(self, rng: np.random.Generator) -> tuple[int, int]:
        """Song and position of a segment in which the target sounds."""
        for _ in range(MAX_TRIES):
            song, start = self._draw_place(rng)
            if not self._is_silent(song, self.target, start):
                break
        return song, start

    def _draw_place(self, rng: np.random.Generator) -> tuple[int, int]:
        song = int(rng.integers(len(self.tracks)))
        return song, int(rng.integers(self.tracks[song].samples - self.samples + 1))

    def _draw_gain(self, rng: np.random.Generator) -> float:
        gain = 10 ** (rng.uniform(-1, 1) * self.settings.gain_db / 20)
        return -gain if rng.random() < 0.5 * self.settings.flip_polarity else gain

    def _draw_semitones(self, rng: np.random.Generator) -> int:
        return int(rng.integers(-self.settings.speed_semitones, self.settings.speed_semitones + 1))

    def _cut(self, song: int, stem: int, start: int) -> np.ndarray:
        """`(channels, samples)` int16 of one stem; row 0 of the store is the mixture, so stems start at row 1."""
        return self._audio[song][1 + stem, :, start : start + self.samples]

    def _is_silent(self, song: int, stem: int, start: int) -> bool:
        return self.tracks[song].scale * rms(self._cut(song, stem, start)) <= 10 ** (
            SILENCE_DB / 20
        )

    # --- assembling, on the device

    def assemble(self, draw: Draw, device: torch.device | str = "cpu") -> Batch:
        """The batch of a draw, on `device`: to floats, gain, polarity, speed, and the sum of it all.

        Speed changes pitch and tempo together and keeps attacks sharp. Source: T. Ko et al., "Audio augmentation for speech
        recognition", Interspeech 2015.
        """
        semitones, draw = (
            draw.semitones,
            draw.to(device),
        )  # a GPU would have to be waited for to know which speeds there are
        stems = draw.segments.float().mul_(
            draw.gains[..., None, None]
        )  # (batch, stems, channels, samples)
        whole, stems = (
            stems,
            stems[..., : self.settings.segment],
        )  # more was read where the speed may change
        for n in semitones.unique().tolist() if self.settings.speed_semitones else []:
            at = (semitones == n).nonzero(as_tuple=True)  # example, stem
            stems[at] = _at_speed(whole[at], speed_of(n), self.settings.segment)
        return Batch(stems.sum(dim=1), stems[:, self.target], stems)


def share_of(tracks: list[Track], share: float) -> list[Track]:
    """That share of the tracks, at least one, in their order; a larger share holds all of a smaller one."""
    count = math.ceil(round(share * len(tracks), 6))  # 0.07 * 100 is a little more than 7
    chosen = np.random.default_rng(0).permutation(len(tracks))[:count]
    return [tracks[index] for index in sorted(chosen)]


def speed_of(semitones: int) -> Fraction:
    """How much faster a sound is that many semitones higher; a small fraction, which is quick to resample by."""
    return Fraction(2 ** (semitones / 12)).limit_denominator(MAX_DENOMINATOR)


def _at_speed(audio: torch.Tensor, speed: Fraction, samples: int) -> torch.Tensor:
    """`samples` of `(..., longer)`, played `speed` times as fast: pitch and tempo change together, as on a tape."""
    return torchaudio.functional.resample(
        audio[..., : math.ceil(samples * speed)], speed.numerator, speed.denominator
    )[..., :samples]
