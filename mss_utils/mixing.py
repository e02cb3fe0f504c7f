"""Training batches, mixed on the fly: random mixing, augmentation and the curriculum.

    Store --draw--> RawBatch: int16 segments, gains, speeds --assemble, on the device--> Batch

A batch depends only on (seed, step): every model of a run trains on the same batches in the same
order, a resumed training continues with the next batch, and the number of loader threads changes
nothing. Taught in notebook 01.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np
import torch
import torchaudio

from mss_utils.config import Settings
from mss_utils.data import SILENCE_DB, Store, Track, rms

MAX_TRIES = 100  # to find a segment with the target; one that is active 5 % of the time: 0.6 % fail
MAX_DENOMINATOR = 32  # of a speed; at most four cents off


@dataclass(frozen=True)
class RawBatch:
    """Segments of a batch as read from the store, and how to augment them; `(batch, stems)`.

    A stem that an example leaves out has gain 0.
    """

    segments: torch.Tensor  # int16 (batch, stems, channels, samples); longer if speeds vary
    gains: torch.Tensor  # float32: int16 to full scale, gain and polarity
    semitones: torch.Tensor  # int64: how much higher and faster

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RawBatch:
        """Return a batch with `function` of each tensor."""
        return RawBatch(*map(function, vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """A training batch; the stems sum to the mixture."""

    mixture: torch.Tensor  # (batch, channels, samples)
    target: torch.Tensor  # (batch, channels, samples)
    stems: torch.Tensor  # (batch, stems, channels, samples)


class Mixer:
    """Makes the training batches of one target; ValueError if no track is as long as a segment."""

    def __init__(self, store: Store, settings: Settings, target: str, seed: int = 0):
        self.store, self.settings, self.seed = store, settings, seed
        self.target = store.stem_index(target)
        # a stem that is played faster needs more samples
        self.samples = math.ceil(settings.segment * speed_of(settings.speed_semitones))
        tracks = share_of(store.split("train"), settings.train_share)
        self.tracks = [track for track in tracks if track.samples >= self.samples]
        if not self.tracks:
            longest = max(track.samples for track in tracks) / store.sample_rate
            raise ValueError(
                f"No training track lasts segment_s={settings.segment_s} s; the longest has "
                f"{longest:.1f} s: set segment_s lower."
            )
        self._audio = [store.raw(track) for track in self.tracks]

    def batch(self, step: int, device: torch.device | str = "cpu") -> Batch:
        """Return the batch of a training step."""
        return self.assemble(self.draw(step), device)

    def batches(
        self,
        first: int,
        last: int,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Yield the batches of steps `first` to `last` - 1, read ahead and assembled on `device`.

        `share` is (index, count): one of `count` processes gets its part of every batch.
        """
        for raw in self.draws(first, last, torch.device(device).type == "cuda", share):
            yield self.assemble(raw, device)

    def draws(
        self, first: int, last: int, pin_memory: bool = False, share: tuple[int, int] = (0, 1)
    ) -> Iterator[RawBatch]:
        """Yield the raw batches of steps `first` to `last` - 1; threads read ahead."""
        index, count = share

        def read(step: int) -> RawBatch:
            raw = self.draw(step).map(lambda tensor: tensor[index::count].contiguous())
            return raw.map(torch.Tensor.pin_memory) if pin_memory else raw  # for GPUs: faster copy

        steps, n_threads = iter(range(first, last)), self.settings.loader_workers
        with ThreadPoolExecutor(n_threads) as pool:
            queue = deque(pool.submit(read, step) for step in islice(steps, n_threads + 1))
            while queue:
                raw = queue.popleft().result()
                queue.extend(pool.submit(read, step) for step in islice(steps, 1))
                yield raw

    def stage(self, step: int) -> int:
        """Return the curriculum stage: 1 target and one source, 2 three sources, 3 all."""
        if not self.settings.curriculum:
            return 3
        return 1 + (step >= self.settings.stage2_step) + (step >= self.settings.stage3_step)

    def draw(self, step: int) -> RawBatch:
        """Draw tracks, positions and augmentation of a step; read segments, and swap channels."""
        rng, settings = np.random.default_rng([self.seed, step]), self.settings
        shape = settings.batch_size, len(self.store.stems)
        segments = np.zeros((*shape, self.store.channels, self.samples), np.int16)
        gains, semitones = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for i in range(settings.batch_size):
            # Coherent stems are of one track, all others are mixed at random (random mixing).
            coherent = not settings.random_mix or rng.random() < settings.coherent_share
            common_semitones = self._draw_semitones(rng)
            for stem, (track, start) in self._draw_positions(rng, step, coherent).items():
                order = -1 if rng.random() < 0.5 * settings.swap_channels else 1
                segments[i, stem] = self._read(track, stem, start)[::order]
                gains[i, stem] = self.tracks[track].scale * self._draw_gain(rng)
                semitones[i, stem] = common_semitones if coherent else self._draw_semitones(rng)
        return RawBatch(*map(torch.from_numpy, (segments, gains, semitones)))

    def _draw_positions(
        self, rng: np.random.Generator, step: int, coherent: bool
    ) -> dict[int, tuple[int, int]]:
        """Draw track and start of every stem of an example; stems left out are missing."""
        silent = rng.random() < self.settings.silent_share
        target_position = self._draw_target(rng)
        others = [stem for stem in range(len(self.store.stems)) if stem != self.target]
        stage = self.stage(step)
        others = rng.permutation(others)[: len(others) if stage == 3 else stage].tolist()
        positions = {} if silent else {self.target: target_position}
        for stem in others:
            positions[stem] = target_position if coherent else self._draw_position(rng)
        return positions

    def _draw_target(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw track and start of a segment with an active target."""
        track, start = self._draw_position(rng)
        for _ in range(MAX_TRIES - 1):
            level = self.tracks[track].scale * rms(self._read(track, self.target, start))
            if level > 10 ** (SILENCE_DB / 20):
                break
            track, start = self._draw_position(rng)
        return track, start

    def _draw_position(self, rng: np.random.Generator) -> tuple[int, int]:
        track = int(rng.integers(len(self.tracks)))
        return track, int(rng.integers(self.tracks[track].samples - self.samples + 1))

    def _draw_gain(self, rng: np.random.Generator) -> float:
        gain = 10 ** (rng.uniform(-1, 1) * self.settings.gain_db / 20)
        return -gain if rng.random() < 0.5 * self.settings.flip_polarity else gain

    def _draw_semitones(self, rng: np.random.Generator) -> int:
        limit = self.settings.speed_semitones
        return int(rng.integers(-limit, limit + 1))

    def _read(self, track: int, stem: int, start: int) -> np.ndarray:
        """Read `(channels, samples)` int16 of one stem; row 0 of the store is the mixture."""
        return self._audio[track][1 + stem, :, start : start + self.samples]

    def assemble(self, raw: RawBatch, device: torch.device | str = "cpu") -> Batch:
        """Augment the stems (gain, polarity, speed) and add them to the mixture, on `device`.

        Speed changes pitch and tempo together and keeps attacks sharp. Source: T. Ko et al., "Audio
        augmentation for speech recognition", Interspeech 2015.
        """
        semitones = raw.semitones  # on the CPU: reading them must not wait for a GPU
        raw = raw.map(lambda tensor: tensor.to(device, non_blocking=True))
        stems = raw.segments.float().mul_(raw.gains[..., None, None])
        long, stems = stems, stems[..., : self.settings.segment]
        for n in semitones.unique().tolist() if self.settings.speed_semitones else []:
            selected = (semitones == n).nonzero(as_tuple=True)  # examples, stems
            stems[selected] = _change_speed(long[selected], speed_of(n), self.settings.segment)
        return Batch(stems.sum(dim=1), stems[:, self.target], stems)


def share_of(tracks: list[Track], share: float) -> list[Track]:
    """Return a share of the tracks, at least one; a larger share contains a smaller one."""
    count = math.ceil(round(share * len(tracks), 6))  # 0.07 * 100 is a little more than 7
    chosen = np.random.default_rng(0).permutation(len(tracks))[:count]
    return [tracks[index] for index in sorted(chosen)]


def speed_of(semitones: int) -> Fraction:
    """Return the speed that changes the pitch by semitones, as a small fraction."""
    return Fraction(2 ** (semitones / 12)).limit_denominator(MAX_DENOMINATOR)


def _change_speed(audio: torch.Tensor, speed: Fraction, samples: int) -> torch.Tensor:
    """Return `samples` of `(..., longer)` at another speed: pitch and tempo change together."""
    part = audio[..., : math.ceil(samples * speed)]
    resample = torchaudio.functional.resample
    return resample(part, speed.numerator, speed.denominator)[..., :samples]
