"""Play songs on the sampled instruments of a SoundFont 2 file, the one inside `pretty_midi`.

A SoundFont maps (bank, program, key) to zones: looped recordings with tuning, level and envelope.
`key_sound` plays the zones of a key once, mono, at the working rate; `_perform` adds dynamics,
panning, vibrato and reverberation. Only what this project needs is read: no modulators, no filters,
one velocity. (symusic's synthesiser ignores `overridingRootKey`, which this SoundFont needs.)
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.signal import butter, firwin, iirpeak, lfilter, oaconvolve, resample_poly, sosfilt

from mss_utils.songs.composing import DRUM_RING_S, STEMS, Note, Part, Song

SAMPLE_RATE = 22_050
DRUM_BANK = 128

# generators by their number in the specification (section 8.1.2)
_START_LOOP, _END_LOOP, _START_LOOP_COARSE, _END_LOOP_COARSE = 2, 3, 45, 50
_ATTACK, _HOLD, _DECAY, _SUSTAIN = 34, 35, 36, 37
_INSTRUMENT, _KEYS, _VELOCITIES, _ATTENUATION, _COARSE, _FINE, _SAMPLE, _MODES, _SCALE, _ROOT = (
    41,
    43,
    44,
    48,
    51,
    52,
    53,
    54,
    56,
    58,
)

_RECORDS = {
    "phdr": [
        ("name", "S20"),
        ("program", "<u2"),
        ("bank", "<u2"),
        ("bag", "<u2"),
        ("library", "<u4", 3),
    ],
    "inst": [("name", "S20"), ("bag", "<u2")],
    "shdr": [
        ("name", "S20"),
        ("start", "<u4"),
        ("end", "<u4"),
        ("loop", "<u4"),
        ("stop", "<u4"),
        ("rate", "<u4"),
        ("key", "u1"),
        ("cents", "i1"),
        ("link", "<u2"),
        ("type", "<u2"),
    ],
    "pbag": [("gen", "<u2"), ("mod", "<u2")],
    "ibag": [("gen", "<u2"), ("mod", "<u2")],
    "pgen": [("what", "<u2"), ("value", "<i2")],
    "igen": [("what", "<u2"), ("value", "<i2")],
    "smpl": "<i2",
}


class Zone(NamedTuple):
    """One recording as a key plays it: samples, loop (None: played once), generators by number."""

    sound: np.ndarray
    rate: int
    root: float
    loop: tuple[int, int] | None
    settings: dict[int, int]


@lru_cache(maxsize=1)
def _tables() -> dict[str, np.ndarray]:
    """Return every chunk of the SoundFont as an array of records."""
    import pretty_midi

    data = (Path(str(pretty_midi.__file__)).parent / "TimGM6mb.sf2").read_bytes()
    return {
        name: np.frombuffer(
            data, np.dtype(_RECORDS[name]), size // np.dtype(_RECORDS[name]).itemsize, start
        )
        for name, start, size in _chunks(data, 0, len(data))
        if name in _RECORDS
    }


def _chunks(data: bytes, start: int, stop: int):
    """Return (name, start, size) of every RIFF chunk; lists are opened."""
    while start < stop:
        name, size = (
            data[start : start + 4].decode("latin1"),
            struct.unpack_from("<I", data, start + 4)[0],
        )
        if name in ("RIFF", "LIST"):
            yield from _chunks(data, start + 12, start + 8 + size)
        else:
            yield name, start + 8, size
        start += 8 + size + size % 2


def _settings(level: str, first: int, last: int, link: int) -> list[dict[int, int]]:
    """Return the generators of each zone of a preset (`p`) or instrument (`i`), with defaults."""
    bags, generators = _tables()[level + "bag"]["gen"], _tables()[level + "gen"]
    zones = [dict(generators[bags[i] : bags[i + 1]].tolist()) for i in range(first, last)]
    defaults = zones[0] if zones and link not in zones[0] else {}
    return [{**defaults, **zone} for zone in zones if link in zone]


def _covers(zone: dict[int, int], key: int, velocity: int = 100) -> bool:
    """Whether a zone is for a key, at a velocity of 100."""
    for what, value in ((_KEYS, key), (_VELOCITIES, velocity)):
        limits = zone.get(what, 127 << 8) & 0xFFFF
        if not limits & 0xFF <= value <= limits >> 8:
            return False
    return True


@lru_cache(maxsize=4096)
def zones(bank: int, program: int, key: int) -> tuple[Zone, ...]:
    """Return the zones of a key; ValueError for a program that the SoundFont lacks."""
    presets, instruments = _tables()["phdr"], _tables()["inst"]
    found = np.flatnonzero((presets["bank"][:-1] == bank) & (presets["program"][:-1] == program))
    if not len(found):
        raise ValueError(
            f"The SoundFont has no program {program} in bank {bank}: use 0-127 in bank 0, or a "
            f"kit of bank {DRUM_BANK}."
        )
    sounding = []
    first, last = presets["bag"][found[0] : found[0] + 2].tolist()
    for outer in _settings("p", first, last, _INSTRUMENT):
        first, last = instruments["bag"][outer[_INSTRUMENT] : outer[_INSTRUMENT] + 2].tolist()
        for inner in _settings("i", first, last, _SAMPLE) if _covers(outer, key) else ():
            if _covers(inner, key):
                added = {
                    what: inner.get(what, 0) + value
                    for what, value in outer.items()
                    if what not in (_KEYS, _VELOCITIES)
                }
                sounding.append(_zone({**inner, **added}))
    return tuple(sounding)


def _zone(settings: dict[int, int]) -> Zone:
    """Cut the recording out of the SoundFont. Loops count from the recording's start."""
    header = _tables()["shdr"][settings[_SAMPLE]]
    start, rate = int(header["start"]), int(header["rate"])
    sound = _tables()["smpl"][start : int(header["end"])].astype(np.float32) / 32768.0
    loop = (
        int(header["loop"])
        - start
        + settings.get(_START_LOOP, 0)
        + 32768 * settings.get(_START_LOOP_COARSE, 0),
        int(header["stop"])
        - start
        + settings.get(_END_LOOP, 0)
        + 32768 * settings.get(_END_LOOP_COARSE, 0),
    )
    looped = settings.get(_MODES, 0) & 1 and 0 <= loop[0] < loop[1] - 1 <= len(sound)
    root = settings.get(_ROOT, -1) if settings.get(_ROOT, -1) >= 0 else int(header["key"])
    tune = settings.get(_COARSE, 0) + (settings.get(_FINE, 0) + int(header["cents"])) / 100.0
    return Zone(sound, rate, root - tune, loop if looped else None, settings)


def key_sound(bank: int, program: int, key: int, length_s: float) -> np.ndarray:
    """Play one key: mono `(samples,)`, `length_s` long, envelope up to sustain, no release."""
    n = int(length_s * SAMPLE_RATE)
    total = np.zeros(n, np.float32)
    for zone in zones(bank, program, key):
        speed = (
            zone.rate
            / SAMPLE_RATE
            * 2.0 ** ((key - zone.root) * zone.settings.get(_SCALE, 100) / 1200.0)
        )
        total += _unroll(zone, speed, n) * _envelope(zone.settings, n)
    return total


def _unroll(zone: Zone, speed: float, n: int) -> np.ndarray:
    """Resample a recording to `n` samples, repeating its loop; band-limited if played faster."""
    sound = zone.sound
    if speed > 1.05:
        taps = firwin(63, min(0.95 / speed, 0.99))
        sound = oaconvolve(np.pad(sound, 31, mode="edge"), taps, "valid")
    sound = resample_poly(
        sound, 2, 1
    )  # linear interpolation at twice the rate leaves little of its images
    at = np.arange(n) * (2.0 * speed)
    if zone.loop is None:
        return np.interp(at, np.arange(len(sound)), sound, right=0.0).astype(np.float32)
    begin, end = 2 * zone.loop[0], 2 * zone.loop[1]
    at = np.where(at < end, at, begin + (at - begin) % (end - begin))
    left = at.astype(np.int64)
    after = np.where(left + 1 >= end, begin, left + 1)
    weight = at - left
    return (sound[left] * (1.0 - weight) + sound[after] * weight).astype(np.float32)


def _envelope(settings: dict[int, int], n: int) -> np.ndarray:
    """Return the level over time: attack, hold, and a decay that is linear in dB."""
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    attack, hold, decay = (
        2.0 ** (settings.get(what, -12000) / 1200.0) for what in (_ATTACK, _HOLD, _DECAY)
    )
    fall_db = np.clip(
        (t - attack - hold) / decay * 100.0,
        0.0,
        min(max(settings.get(_SUSTAIN, 0) / 10.0, 0.0), 100.0),
    )
    level_db = -fall_db - 0.04 * settings.get(
        _ATTENUATION, 0
    )  # attenuation counts 0.4 times, as on the hardware
    return np.minimum(t / attack, 1.0) * 10.0 ** (level_db / 20.0)


# --- performing -----------------------------------------------------------------------------------

_DRUM_PAN = {
    42: 0.25,
    44: 0.25,
    46: 0.25,
    49: -0.35,
    51: -0.3,
    54: 0.4,
    70: -0.4,
    50: 0.2,
    45: -0.1,
    43: -0.25,
}  # keys
_STEP = 4  # rounding to 14 bits saves a third of the FLAC files
_RELEASE_S = {"piano": 0.18, "bass": 0.06, "vocals": 0.09, "other": 0.2, "drums": 0.03}
_ROOM = {
    "piano": 0.16,
    "vocals": 0.22,
    "drums": 0.12,
}  # how much of the room each stem gets; the others stay dry
VOWELS = (
    (800, 1200, 2700),
    (480, 850, 2500),
    (480, 1800, 2600),
    (330, 2200, 3000),
    (340, 750, 2300),
)  # a o e i u, Hz


def _perform(part: Part, n_samples: int) -> np.ndarray:
    """Play a part: `(2, samples)`, at an active level of 0 dB plus its gain."""
    places = (
        sorted({_DRUM_PAN.get(note.pitch, 0.0) for note in part.notes})
        if part.drums
        else [part.pan]
    )
    out = np.zeros((2, n_samples), np.float32)
    for place in places:
        notes = [n for n in part.notes if not part.drums or _DRUM_PAN.get(n.pitch, 0.0) == place]
        angle = (place + 1.0) * np.pi / 4.0
        gains = np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)
        wet = (
            _ROOM.get(part.stem, 0.0) if place == 0.0 or not part.drums else 0.0
        )  # cymbals stay dry
        out += gains * _add_room(_strike(part, notes, n_samples), wet)
    return out * np.float32(10.0 ** (part.gain_db / 20.0) / _active_rms(out))


def _strike(part: Part, notes: list[Note], n_samples: int) -> np.ndarray:
    """Sum the notes of a part that share a panning: `(samples,)`."""
    out = np.zeros(n_samples, np.float32)
    release = int(_RELEASE_S[part.stem] * SAMPLE_RATE)
    fade = (0.5 + 0.5 * np.cos(np.linspace(0.0, np.pi, release))).astype(np.float32)
    longest: dict[int, float] = {}
    for note in notes:
        longest[note.pitch] = max(longest.get(note.pitch, 0.0), note.end_s - note.start_s)
    keys = {
        pitch: _key(part, pitch, length + _RELEASE_S[part.stem] + 0.02)
        for pitch, length in longest.items()
    }
    strengths = {}
    for note in notes:
        touch = (note.pitch, int(4 * note.velocity))
        if touch not in strengths:
            strengths[touch] = _soften(part, note.pitch, keys[note.pitch], touch[1])
        start, stop = int(note.start_s * SAMPLE_RATE), int(note.end_s * SAMPLE_RATE) + release
        sound = strengths[touch][: min(stop, n_samples) - start] * np.float32(note.velocity**1.6)
        sound = _voice(sound, note) if part.stem == "vocals" else sound
        tail = min(release, len(sound))
        sound[-tail:] *= fade[-tail:]
        out[start : start + len(sound)] += sound
    return out


def _key(part: Part, pitch: int, length_s: float) -> np.ndarray:
    """Return the sound of a key; the short decay of the piano's recordings is extended."""
    sound = _equalise(
        part.stem, key_sound(DRUM_BANK if part.drums else 0, part.program, pitch, length_s)
    )
    t = np.arange(len(sound), dtype=np.float32) / SAMPLE_RATE
    if part.drums:
        return sound * 10.0 ** (-2.0 * t / DRUM_RING_S.get(pitch, 1.0))
    if part.stem != "piano":
        return sound
    t60 = 9.0 * 2.0 ** ((60 - pitch) / 18.0)
    return sound * _level(
        sound, 0.45 * 10.0 ** (-3.0 * t / t60) + 0.55 * 10.0 ** (-3.0 * t / (0.2 * t60))
    )


def _level(sound: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the gain that gives a sound the wanted envelope, at most 18 dB."""
    window = int(0.03 * SAMPLE_RATE)
    total = np.concatenate([[0.0], np.cumsum(sound.astype(np.float64) ** 2)])
    upper = np.minimum(np.arange(len(sound)) + window, len(sound))
    envelope = np.sqrt((total[upper] - total[:-1]) / (upper - np.arange(len(sound)))) + 1e-7
    start = envelope[: 2 * window].max()
    return np.minimum(start / envelope, 8.0).astype(np.float32) * wanted


def _soften(part: Part, pitch: int, sound: np.ndarray, strength: int) -> np.ndarray:
    """Make a soft stroke darker: first-order low-pass above the fundamental."""
    if strength >= 3 or part.stem == "vocals":
        return sound
    cutoff = (1200.0, 2200.0, 4000.0)[strength] + 440.0 * 2.0 ** ((pitch - 69) / 12.0)
    return lfilter(*butter(1, min(cutoff, 9000.0), fs=SAMPLE_RATE), sound).astype(np.float32)


def _voice(sound: np.ndarray, note: Note) -> np.ndarray:
    """Sing a note: it starts below, swells, gets vibrato if it is long, and has a vowel."""
    t = np.arange(len(sound)) / SAMPLE_RATE
    scoop = 0.5 * np.exp(-t / 0.04)  # semitones below
    vibrato = 0.22 * np.clip((t - 0.25) / 0.4, 0.0, 1.0) * np.sin(2.0 * np.pi * 5.4 * t)
    speed = 2.0 ** ((vibrato - scoop) / 12.0)
    sound = np.interp(np.cumsum(speed) - speed[0], np.arange(len(sound)), sound)
    shaped = 0.3 * sound
    for formant, strength in zip(VOWELS[note.vowel], (1.0, 0.8, 0.35), strict=True):
        shaped += strength * lfilter(*iirpeak(formant, 5.0, fs=SAMPLE_RATE), sound)
    return (
        shaped * np.minimum(0.25 + t / 0.08, 1.0) * (0.85 + 0.15 * np.minimum(t / 0.5, 1.0))
    ).astype(np.float32)


def _equalise(stem: str, sound: np.ndarray) -> np.ndarray:
    """Remove rumble. The piano leaves the low octaves to the bass and gets presence."""
    sound = sosfilt(_highpass(2, 150.0 if stem == "piano" else 30.0), sound)
    if stem == "piano":
        sound = sound + 1.5 * sosfilt(_highpass(1, 1200.0), sound)
    return sound.astype(np.float32)


def _add_room(sound: np.ndarray, wet: float) -> np.ndarray:
    """Return the sound with its reverberation."""
    return sound + np.float32(wet) * oaconvolve(sound, _room())[: len(sound)] if wet else sound


@cache
def _highpass(order: int, cutoff: float) -> np.ndarray:
    """Return a Butterworth high-pass in sections."""
    return butter(order, cutoff, "highpass", fs=SAMPLE_RATE, output="sos")


@lru_cache(maxsize=1)
def _room() -> np.ndarray:
    """Return the room response of all songs: decaying, dark noise of unit energy."""
    t = np.arange(int(0.9 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = (
        np.random.default_rng(1).normal(size=len(t))
        * 10.0 ** (-3.0 * t / 0.9)
        * np.minimum(t / 0.01, 1.0)
    )
    noise = lfilter(*butter(1, 2500.0, fs=SAMPLE_RATE), noise)
    return (noise / np.sqrt(np.square(noise).sum())).astype(np.float32)


def _active_rms(sound: np.ndarray) -> float:
    """Return the RMS over the tenths of a second that are within 35 dB of the loudest."""
    size = SAMPLE_RATE // 10
    n = sound.shape[1] // size
    power = np.square(sound[:, : n * size]).reshape(2, n, size).mean((0, 2))
    return float(np.sqrt(power[power > power.max() * 10.0**-3.5].mean()))


def render(song: Song) -> dict[str, np.ndarray]:
    """Render all stems: stem -> int16 `(samples, 2)`; their sum peaks at -1 dBFS."""
    rng = np.random.default_rng([*song.metadata["seed"], 1])
    n_samples = int(round(song.duration_s * SAMPLE_RATE))
    stems = {stem: np.zeros((2, n_samples), np.float32) for stem in STEMS}
    for part in song.parts:
        if part.notes:
            stems[part.stem] += _perform(part, n_samples)
    _balance(rng, stems)
    n_fade = int(0.6 * SAMPLE_RATE)
    for sound in stems.values():
        sound[:, -n_fade:] *= np.cos(np.linspace(0.0, np.pi / 2, n_fade, dtype=np.float32)) ** 2
    mixture = sum(stems.values())
    peak = max(np.abs(sound).max() for sound in (mixture, *stems.values()))
    scale = 10.0 ** (-1.0 / 20.0) * 32767.0 / peak / _STEP
    return {
        stem: (np.round(sound.T * scale) * _STEP).astype(np.int16) for stem, sound in stems.items()
    }


def _balance(rng: np.random.Generator, stems: dict[str, np.ndarray]) -> None:
    """Set the levels in place: drums and voice in front, the piano 6 dB below the rest."""
    for stem, level_db in (("vocals", 0.0), ("drums", 3.5), ("bass", -1.5), ("other", -5.0)):
        gain_db = level_db + rng.uniform(-1.5, 1.5)
        stems[stem] *= np.float32(10.0 ** (gain_db / 20.0) / _active_rms(stems[stem]))
    first, *rest = [stems[stem] for stem in STEMS if stem != "piano"]
    residual = sum(rest, start=first).mean(0)
    wanted_db = float(np.clip(rng.normal(-5.9, 1.2), -9.0, -3.6))
    found_db = 10.0 * np.log10(np.square(stems["piano"].mean(0)).sum() / np.square(residual).sum())
    stems["piano"] *= np.float32(10.0 ** ((wanted_db - found_db) / 20.0))
