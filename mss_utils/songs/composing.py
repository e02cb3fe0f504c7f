"""Compose the built-in songs: key, tempo, metre, form, chords, groove, melody, every player's part.

The material is text: roman numerals between bar lines, and patterns with one character per
sixteenth. A song draws its material at random and keeps it, so patterns, riffs and hooks return
exactly, as in loops and refrains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

STEMS = ("vocals", "drums", "bass", "piano", "other")
SPLITS = ("train", "valid", "test")
N_VOWELS = 5  # a o e i u

# --- harmony: bars separated by |, roman numerals over the major scale, also in minor keys -----

HARMONIES = {  # name: (mode, verse, chorus, bridge)
    "axis": ("major", "I | V | vi | IV", "IV | I | V | vi", "ii | IV | vi | V"),
    "fifties": ("major", "I | vi | IV | V", "I | vi | ii | V7", "IV | iv | I | V"),
    "canon": (
        "major",
        "I | V/3 | vi | iii | IV | I/3 | IV | V",
        "IV | V | iii | vi | IV | V | I | I",
        "ii | V | iii | vi",
    ),
    "plagal": ("major", "I | IV | I | IV", "vi | IV | I | V", "bVII | IV | I | I"),
    "descent": (
        "major",
        "I V/3 | vi I/5 | IV I/3 | ii V",
        "IV | V | I V/3 | vi",
        "vi | iii | IV | V",
    ),
    "open": ("major", "I | I | IV | I", "IV | V | I | vi", "vi | ii | V | V"),
    "anthem": ("major", "vi | IV | I | V", "IV | V | vi | I/3", "ii | vi | IV | Vsus4 V"),
    "gospel": ("major", "I | I7 | IV | iv", "I III7 | vi I7 | IV iv | I V7", "IV | I/3 | II7 | V7"),
    "mixolydian": ("major", "I | bVII | IV | I", "IV | bVII | I | I", "bVI | bVII | I | V"),
    "secondary": ("major", "I | III7 | vi | IV", "I | II7 | IV | I", "vi | III7 | IV | V7"),
    "turnaround": (
        "major",
        "Imaj7 | vi7 | ii7 | V7",
        "IVmaj7 | iii7 | ii7 | V7",
        "iv7 | bVII7 | Imaj7 | VI7",
    ),
    "circle": (
        "major",
        "iii7 | vi7 | ii7 | V7",
        "Imaj7 VI7 | ii7 V7 | iii7 VI7 | ii7 V7",
        "IVmaj7 | iv6 | iii7 | VI7",
    ),
    "bossa": (
        "major",
        "Imaj7 | II7 | ii7 | V7",
        "IVmaj7 | iv6 | Imaj7 | VI7",
        "ii7 | V7 | iii7 | VI7",
    ),
    "soul": (
        "major",
        "Imaj7 | IVmaj7 | Imaj7 | IVmaj7",
        "ii7 | iii7 | IVmaj7 | V7",
        "vi7 | II7 | ii7 | V7",
    ),
    "blues": (
        "major",
        "I7 | IV7 | I7 | V7",
        "I7 | I7 | IV7 | IV7 | I7 | V7 | I7 | V7",
        "IV7 | IV7 | I7 | V7",
    ),
    "lullaby": ("major", "I | iii | IV | V", "vi | iii | IV | I", "IV | I/3 | ii | V7"),
    "epic": ("minor", "i | bVI | bIII | bVII", "bVI | bVII | i | bIII", "iv | bVI | i | V"),
    "andalusian": ("minor", "i | bVII | bVI | V", "iv | bVII | bIII | bVI", "bVI | V | bVI | V7"),
    "chamber": ("minor", "i | iv | V7 | i", "iv | bVII | bIII | bVI", "iv | i | iiø | V7"),
    "autumn": (
        "minor",
        "iv7 | bVII7 | bIIImaj7 | bVImaj7",
        "iiø | V7 | i7 | i7",
        "bVImaj7 | iiø | V7 | i7",
    ),
    "dorian": ("minor", "i7 | IV7 | i7 | IV7", "bIII | bVII | IV | i", "bVI | bVII | i7 | IV7"),
    "lament": ("minor", "i | V/3 | bIII/5 | IV/3", "bVI | bIII | bVII | i", "iv | V7 | bVI | V"),
    "pulse": ("minor", "i | i | bVI | bVII", "bVI | bVII | i | v", "iv | iv | bVI | V"),
    "nocturne": (
        "minor",
        "i | v7 | bVI | bIII",
        "iv | bVII | bIII | bVI | iiø | V7 | i | i",
        "bVI | bII | V7 | V7",
    ),
}
_DEGREES = {"I": 0, "II": 2, "III": 4, "IV": 5, "V": 7, "VI": 9, "VII": 11}
_SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
_ADDED = {"": (), "7": (10,), "maj7": (11,), "6": (9,), "ø": (10,), "o": (), "sus4": ()}
_NUMERAL = re.compile(r"^([b#]?)([IV]+|[iv]+)(maj7|sus4|7|6|ø|o)?(?:/([35]))?$")
_KEYS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")

# --- patterns: one character per sixteenth; x hit, X accent, o soft, . held, - rest --------------

_KICK, _STICK, _SNARE, _CLAP, _HAT, _PEDAL, _OPEN, _CRASH, _RIDE, _TAMB, _SHAKER = (
    36,
    37,
    38,
    39,
    42,
    44,
    46,
    49,
    51,
    54,
    70,
)
_TOMS = (50, 47, 45, 43)

# name: metre, tempo range, swing (position of the off-beat; 0.5 is straight), kits, bass styles,
# lines
GROOVES = {
    "rock": dict(
        metre="4/4",
        bpm=(96, 142),
        kits=(0, 8, 16),
        bass=("eighths", "pop"),
        lines={_KICK: "X.......x.x.....", _SNARE: "....X.......X...", _HAT: "x.o.x.o.x.o.x.o."},
    ),
    "pop": dict(
        metre="4/4",
        bpm=(88, 124),
        kits=(8, 16),
        bass=("pop", "syncopated"),
        lines={_KICK: "X.....x.x.......", _SNARE: "....X..o.o..X...", _HAT: "xoxoxoxoxoxoxoxo"},
    ),
    "halftime": dict(
        metre="4/4",
        bpm=(116, 160),
        kits=(16, 24),
        bass=("long", "pop"),
        lines={_KICK: "X.........x...x.", _SNARE: "........X.......", _HAT: "x.o.x.o.x.o.x.oo"},
    ),
    "fourfloor": dict(
        metre="4/4",
        bpm=(110, 132),
        kits=(24, 25, 16),
        bass=("octaves", "offbeat"),
        lines={
            _KICK: "X...X...X...X...",
            _CLAP: "....x.......x...",
            _OPEN: "..x...x...x...x.",
            _SHAKER: "xoxoxoxoxoxoxoxo",
        },
    ),
    "disco": dict(
        metre="4/4",
        bpm=(104, 126),
        kits=(16, 8),
        bass=("octaves",),
        lines={
            _KICK: "X...X...X...X...",
            _SNARE: "....X.......X..o",
            _HAT: "xo.oxo.oxo.oxo.o",
            _OPEN: "..x...x...x...x.",
        },
    ),
    "funk": dict(
        metre="4/4",
        bpm=(88, 112),
        kits=(16, 8),
        bass=("funk", "syncopated"),
        lines={_KICK: "X..x..x...x..x..", _SNARE: "....X..o.o..X..o", _HAT: "xoxxxoxxxoxxxoxo"},
    ),
    "motown": dict(
        metre="4/4",
        bpm=(100, 132),
        kits=(0, 8),
        bass=("motown", "syncopated"),
        lines={
            _KICK: "X.....x.X.....x.",
            _SNARE: "x...X...x...X...",
            _HAT: "x.o.x.o.x.o.x.o.",
            _TAMB: "..o...o...o...o.",
        },
    ),
    "bossa": dict(
        metre="4/4",
        bpm=(100, 140),
        kits=(32, 40),
        bass=("bossa",),
        lines={_KICK: "x.....xxx.....xx", _STICK: "x.....x.....x...", _HAT: "xoxoxoxoxoxoxoxo"},
    ),
    "swing": dict(
        metre="4/4",
        bpm=(104, 168),
        swing=0.65,
        kits=(32, 40),
        bass=("walking",),
        lines={
            _RIDE: "x...x.o.x...x.o.",
            _PEDAL: "....x.......x...",
            _KICK: "o.......o.......",
            _SNARE: "..............o.",
        },
    ),
    "shuffle": dict(
        metre="4/4",
        bpm=(84, 130),
        swing=0.66,
        kits=(0, 8, 16),
        bass=("shuffle", "walking"),
        lines={_KICK: "X.......x.......", _SNARE: "....X.......X...", _HAT: "x.o.x.o.x.o.x.o."},
    ),
    "reggae": dict(
        metre="4/4",
        bpm=(124, 152),
        swing=0.54,
        kits=(0, 16),
        bass=("dub",),
        lines={_KICK: "........X.......", _STICK: "........X.....o.", _HAT: "o.x.o.x.o.x.o.xo"},
    ),
    "ballad": dict(
        metre="4/4",
        bpm=(62, 88),
        kits=(8, 16, 0),
        bass=("long", "pop"),
        lines={_KICK: "X.........x.....", _SNARE: "....X.......X...", _HAT: "x.x.x.x.x.x.x.x."},
    ),
    "neosoul": dict(
        metre="4/4",
        bpm=(70, 92),
        swing=0.57,
        kits=(8, 24),
        bass=("syncopated", "funk"),
        lines={_KICK: "X......x..x.....", _SNARE: "....X.......X..o", _HAT: "x.xox.x.x.xox.xx"},
    ),
    "train": dict(
        metre="4/4",
        bpm=(92, 124),
        kits=(40, 0),
        bass=("twobeat",),
        lines={_KICK: "X...x...X...x...", _SNARE: "ooXoooXoooXooxXo"},
    ),
    "waltz": dict(
        metre="3/4",
        bpm=(96, 150),
        kits=(0, 32, 40),
        bass=("waltz",),
        lines={_KICK: "X...........", _SNARE: "....o...o...", _HAT: "....x...x.o."},
    ),
    "jazzwaltz": dict(
        metre="3/4",
        bpm=(112, 160),
        swing=0.64,
        kits=(32, 40),
        bass=("walking", "waltz"),
        lines={
            _RIDE: "x...x.o.x...",
            _PEDAL: "....x.......",
            _SNARE: "......o.....",
            _KICK: "x...........",
        },
    ),
    "sixeight": dict(
        metre="6/8",
        bpm=(44, 66),
        kits=(8, 16, 0),
        bass=("rolling",),
        lines={_KICK: "X.........x.", _SNARE: "......X.....", _HAT: "x.o.o.x.o.o."},
    ),
    "folk": dict(
        metre="6/8",
        bpm=(58, 84),
        kits=(0, 40),
        bass=("rolling",),
        lines={_KICK: "X.....x.....", _STICK: "......x.....", _SHAKER: "x.oox.x.oox."},
    ),
}
_STEPS = {"4/4": 16, "3/4": 12, "6/8": 12}  # sixteenths in a bar
_BEAT = {"4/4": 4, "3/4": 4, "6/8": 6}  # sixteenths in a beat
_FILLS = {  # the last half bar (4/4) or last beats of a section; digits are toms from high to low
    8: ("x.x.x.x.", "xxxx0011", "x.0.1.23", "0011223X", "..xx.xxX", "x.xx1.3."),
    6: ("x.x.xx", "0.1.2.", "xx0123", "..xxxX"),
}

# R root, F fifth, O octave, T third, S sixth or seventh, A approach to the next chord; lower case
# is soft
BASSES = {
    "4/4": {
        "pop": "R.....R.R.....f.",
        "eighths": "R.r.R.r.R.r.R.r.",
        "long": "R...........F...",
        "walking": "R...T...F...A...",
        "syncopated": "R..R-.r.-.R.F.A.",
        "octaves": "R-O-R-O-R-O-R-O-",
        "offbeat": "-.R-..R-..R-..R-",
        "funk": "R-.r.-O-R..r-FA-",
        "motown": "R..RT.F.R..FT.A.",
        "bossa": "R.....FFF.....RR",
        "shuffle": "R...T.F.S...F.T.",
        "dub": "R.....R-..T.F.R-",
        "twobeat": "R...-...F...-...",
    },
    "3/4": {"waltz": "R.......F...", "walking": "R...T...F.A."},
    "6/8": {"rolling": "R.....F...A."},
}

# left hand: R low root, P low octave, F fifth, O root an octave up, T tenth, c chord
# right hand: C chord, 0-3 its voices from below, 8 the top voice in octaves, m next riff note
PIANOS = {  # metre: name: (left, right, pedal)
    "4/4": {
        "block": ("R.......R.......", "C...C...C...C...", False),
        "pulse": ("P.......P.....R.", "C.c.C.c.C.c.C.c.", False),
        "ballad": ("R.....F.O...F...", "C.......2.3.2...", True),
        "arpeggio": ("R.......F.......", "0.1.2.3.2.1.2.1.", True),
        "broken": ("R...F...O...F...", "3.2.1.2.3.2.1.2.", True),
        "flowing": ("R.......R.......", "0123212301232123", True),
        "alberti": ("R...............", "0.2.1.2.0.2.1.2.", False),
        "stride": ("P...c...F...c...", "3...2.3.-.3.2.1.", False),
        "charleston": ("R...............", "C.....c-....C-..", False),
        "comp": ("R.....R.........", "-...C-....c-C-..", False),
        "skank": ("R.......R.......", "-...C-..-...C-c-", False),
        "offbeat": ("R.......R.......", "-.C-..C-..C-..C-", False),
        "house": ("R..R..R...R..R..", "C-.C-.C-..C-.C-.", False),
        "gospel": ("P.....R.F...A...", "C..c..C.-.c.C.c.", False),
        "riff": ("R.......R.......", "m..m..m.m.m..m..", False),
        "anthem": ("P.......P.......", "8.1.8.1.8.1.8.1.", True),
        "ostinato": ("P...............", "3.1.2.1.3.1.2.1.", True),
        "montuno": ("R.....F.R.....F.", "8.1.8..18.1.8..1", False),
    },
    "3/4": {
        "waltz": ("R...........", "-...C-..C-..", False),
        "arpeggio": ("R...........", "0.1.2.3.2.1.", True),
        "lullaby": ("R...F...O...", "3.......2.1.", True),
        "block": ("P.......R...", "C.......C...", True),
        "comp": ("R.......F...", "C.....c.-.c-", False),
        "riff": ("R...........", "m...m.m.m...", False),
    },
    "6/8": {
        "rolling": ("R.....F.....", "0.1.2.3.2.1.", True),
        "block": ("P.....P.....", "C.....C.....", True),
        "triplets": ("R.....R.....", "C.c.c.C.c.c.", False),
        "flowing": ("R...........", "012321012321", True),
        "broken": ("R...F...O...", "3.1.2.3.1.2.", True),
        "riff": ("P.....R.....", "m...m.m.m...", False),
    },
}
_COMPS = {  # rhythm players of `other`
    "4/4": (
        "C.cCc.C.C.cCc.c.",
        "C...c...C.c.c.c.",
        "-...C-......C-..",
        "C.....C.....C...",
        "-.c-C-c--.c-C-c-",
        "0.1.2.3.1.2.3.2.",
    ),
    "3/4": ("C...c...c...", "0.1.2.3.2.1.", "C.......C..."),
    "6/8": ("C...c.C...c.", "0.1.2.3.2.1.", "C.....C....."),
}
_SINGING = {  # two bars of melody rhythm; the rest at the end is the breath
    "4/4": (
        "x...x.x.x...x.x.x.......-.......",
        "..x.x.x.x.x.x...x.....x.x...-...",
        "x.....x.x...x...x.x.....x...-...",
        "-...x.x.x..x..x.x.......x...-...",
        "x..x..x.x.....x.x..x..x.....-...",
        "x.......x...x.x.x...........-...",
        "-.x.x.x.x...x...-.x.x.x.x.....-.",
        "x.x.x..x.x.x....x.x.x..x....-...",
    ),
    "3/4": (
        "x.......x...x.......-...",
        "x...x...x...x.......-...",
        "..x.x.x.x.x.x.......-...",
        "x.....x.x...x...x...-...",
    ),
    "6/8": (
        "x...x.x...x.x.......-...",
        "x.x.x.x...x.x.......-...",
        "..x.x.x.....x.x.x...-...",
        "x.....x...x.x.......-...",
    ),
}

# --- form: sections of four bars (I intro, V verse, C chorus, B bridge, O outro) ------------------

_FORMS = {
    1: ("C",),
    2: ("VC",),
    3: ("IVC", "VCC"),
    4: ("IVCO", "VVCC"),
    5: ("IVCVC", "IVCCO"),
    6: ("IVCVCO", "IVVCCO"),
    7: ("IVVCBCO", "IVCVCCO"),
    8: ("IVVCVCCO", "IVVCCBCO"),
    9: ("IVVCVCBCO", "IVVCCVCCO"),
    10: ("IVVCCVCBCO", "IVVCVCBCCO"),
    11: ("IVVCCVCCBCO",),
    12: ("IVVCCVVCCBCO", "IVVCCVCCBCCO"),
    13: ("IVVCCVVCCBCCO",),
    14: ("IIVVCCVVCCBCCO",),
    16: ("IIVVCCVVCCBBCCOO",),
}
_NAMES = {"I": "intro", "V": "verse", "C": "chorus", "B": "bridge", "O": "outro"}
_ENERGY = {"intro": 0.62, "verse": 0.72, "chorus": 1.0, "bridge": 0.8, "outro": 0.7}

# --- who plays: General MIDI programs -------------------------------------------------------------

_PIANO_PROGRAMS = (0, 1, 2, 2, 3)
_BASS_PROGRAMS = {"electric": (33, 34, 36), "upright": (32, 35), "synth": (38, 39)}
_VOICES = (52, 53, 85, 54)
_PADS = (48, 49, 50, 51, 52, 89, 90, 91, 94, 16, 17, 18, 61)
_RHYTHM = (24, 25, 26, 27, 28, 16, 4, 5, 6, 7, 15, 46, 11, 12, 108)
_LEADS = (65, 66, 71, 73, 40, 41, 22, 56, 60, 11, 27, 80, 81, 68, 104)
DRUM_RING_S = {
    _KICK: 0.5,
    _STICK: 0.3,
    _SNARE: 0.6,
    _CLAP: 0.5,
    _HAT: 0.25,
    _PEDAL: 0.2,
    _OPEN: 0.8,
    _CRASH: 3.5,
    _RIDE: 2.0,
    _TAMB: 0.5,
    _SHAKER: 0.2,
    **{tom: 1.2 for tom in _TOMS},
}
_TITLES = (
    (
        "amber",
        "silver",
        "paper",
        "quiet",
        "hollow",
        "golden",
        "winter",
        "velvet",
        "northern",
        "broken",
        "distant",
        "gentle",
        "electric",
        "copper",
        "midnight",
        "early",
        "open",
        "salt",
        "second",
        "bright",
    ),
    (
        "harbour",
        "window",
        "river",
        "letter",
        "garden",
        "station",
        "orchard",
        "signal",
        "lantern",
        "summer",
        "mirror",
        "avenue",
        "island",
        "engine",
        "carousel",
        "morning",
        "shadow",
        "meadow",
        "postcard",
        "waltz",
    ),
)


class Note(NamedTuple):
    """One note: seconds, MIDI pitch (or drum key), velocity 0..1, and the vowel it is sung on."""

    start_s: float
    end_s: float
    pitch: int
    velocity: float
    vowel: int = 0


class Chord(NamedTuple):
    """Pitch classes from the root up, and the pitch class in the bass."""

    tones: tuple[int, ...]
    bass: int


class Bar(NamedTuple):
    """One bar of the plan: its section, its place in it, and the chord from each sixteenth on."""

    section: str
    index: int
    last: bool
    chords: tuple[tuple[int, Chord], ...]


@dataclass
class Part:
    """One player: a General MIDI program (a kit if `drums`), stem, panning (-1 to 1) and notes."""

    stem: str
    program: int
    notes: list[Note] = field(default_factory=list)
    pan: float = 0.0
    gain_db: float = 0.0
    drums: bool = False


@dataclass
class Song:
    """A composed song: `metadata` for song.json, and the notes of every player."""

    name: str
    duration_s: float
    metadata: dict
    parts: list[Part]

    def onsets(self) -> dict[str, list[float]]:
        """Return onset times in seconds, sorted, for every stem."""
        times = {stem: set() for stem in STEMS}
        for part in self.parts:
            times[part.stem].update(round(note.start_s, 4) for note in part.notes)
        return {stem: sorted(found) for stem, found in times.items()}


# --- composing ------------------------------------------------------------------------------------


def compose(
    split: str, index: int, seed: int = 0, duration_s: tuple[float, float] = (45.0, 90.0)
) -> Song:
    """Write one song. The same arguments give the same song, whatever other songs exist.

    The splits share no tempo and no (harmony, groove) pair. Tempi are on a grid of half beats per
    minute: test has the multiples of 4, validation those of 4 plus 2. Pairs are distributed along
    the diagonals of their table.

    Raises
    ------
    ValueError
        Unknown split or impossible duration.
    """
    rng, plan = _start(split, index, seed, duration_s)
    parts = [
        *_vocals(rng, plan),
        _drums(rng, plan),
        _bass(rng, plan),
        _piano(rng, plan),
        *_others(rng, plan),
    ]
    title = "-".join(str(rng.choice(words)) for words in _TITLES)
    metadata = {
        "split": split,
        "index": index,
        "seed": [seed, SPLITS.index(split), index],
        **plan.facts(parts),
    }
    return Song(f"{split}-{index:03d}-{title}", plan.duration_s, metadata, parts)


def _start(
    split: str, index: int, seed: int, duration_s: tuple[float, float]
) -> tuple[np.random.Generator, _Plan]:
    """Return the random stream of a song and the plan that is drawn from it first."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    low, high = duration_s
    if not 4.0 <= low <= high:
        raise ValueError(
            f"duration_s is {duration_s}; expected (shortest, longest), 4 <= shortest <= longest"
        )
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return rng, _plan(rng, split, low, high)


@dataclass
class _Plan:
    """Everything that the players of a song share."""

    harmony: str
    groove: str
    bpm: float
    key: int
    bars: list[Bar]
    duration_s: float
    piano_rest: frozenset[int] = frozenset()

    @property
    def metre(self) -> str:
        return GROOVES[self.groove]["metre"]

    @property
    def steps(self) -> int:
        return _STEPS[self.metre]

    @property
    def step_s(self) -> float:
        return 60.0 / self.bpm / _BEAT[self.metre]

    @property
    def scale(self) -> tuple[int, ...]:
        return tuple((self.key + step) % 12 for step in _SCALES[HARMONIES[self.harmony][0]])

    def time(self, bar: int, step: float) -> float:
        """Return the seconds of a sixteenth, with the groove's swing on the eighths."""
        place = GROOVES[self.groove].get("swing", 0.5)
        beat, within = divmod(step, 4)
        within = within * place * 2 if within <= 2 else 4 * place + (within - 2) * 2 * (1 - place)
        return (bar * self.steps + 4 * beat + within) * self.step_s

    def chord(self, bar: int, step: float) -> Chord:
        """Return the chord at a sixteenth of a bar; the last chord continues after the end."""
        chords = self.bars[min(bar, len(self.bars) - 1)].chords
        return [chord for start, chord in chords if start <= step][-1]

    def facts(self, parts: list[Part]) -> dict:
        """Return the plan as text, for song.json."""
        form = [[bar.section, bar.index + 1] for bar in self.bars if bar.last]
        programs = {stem: sorted({p.program for p in parts if p.stem == stem}) for stem in STEMS}
        return {
            "harmony": self.harmony,
            "groove": self.groove,
            "tempo_bpm": self.bpm,
            "metre": self.metre,
            "key": f"{_KEYS[self.key]} {HARMONIES[self.harmony][0]}",
            "bar_s": self.steps * self.step_s,
            "bars": len(self.bars),
            "form": form,
            "programs": programs,
            "duration_s": self.duration_s,
        }


def _plan(rng: np.random.Generator, split: str, low: float, high: float) -> _Plan:
    """Draw harmony, groove, tempo and key that belong to the split; lay out the bars."""
    pairs = [
        (h, g)
        for i, h in enumerate(HARMONIES)
        for j, g in enumerate(GROOVES)
        if _pair_split(i, j) == split
    ]
    harmony, groove = pairs[rng.integers(len(pairs))]
    slowest, fastest = GROOVES[groove]["bpm"]
    tempi = [t / 2 for t in range(2 * slowest, 2 * fastest + 1) if _tempo_split(t) == split]
    plan = _Plan(harmony, groove, float(rng.choice(tempi)), int(rng.integers(12)), [], 0.0)
    bar_s = plan.steps * plan.step_s
    wanted = rng.uniform(low, high)
    n_bars = max(2, int((wanted - 2.0) / bar_s))
    plan.duration_s = round(float(min(high, max(low, n_bars * bar_s + 2.5))), 3)
    plan.bars = _bars(rng, plan, n_bars)
    plan.piano_rest = _rests(rng, plan)
    return plan


def _pair_split(harmony: int, groove: int) -> str:
    """Return diagonals of the table: of eight, one is for test, one for validation."""
    return {0: "test", 4: "valid"}.get((harmony + 3 * groove) % 8, "train")


def _tempo_split(half_beats: int) -> str:
    """Return the split that owns a tempo, in half beats per minute."""
    return {0: "test", 4: "valid"}.get(half_beats % 8, "train")


def _bars(rng: np.random.Generator, plan: _Plan, n_bars: int) -> list[Bar]:
    """Fill the form with chords: bars beyond a multiple of four go to the last section."""
    blocks = max(1, n_bars // 4)
    size = max(n for n in _FORMS if n <= blocks)
    form = str(rng.choice(_FORMS[size]))
    form += form[-1] * (blocks - size)
    sections = [(_NAMES[m.group()[0]], 4 * len(m.group())) for m in re.finditer(r"(.)\1*", form)]
    sections[-1] = (sections[-1][0], sections[-1][1] + n_bars - 4 * blocks)
    bars = []
    for name, length in sections:
        chords = _progression(plan, name)
        bars += [Bar(name, i, i == length - 1, chords[i % len(chords)]) for i in range(length)]
    home = _chord("I" if HARMONIES[plan.harmony][0] == "major" else "i", plan.key)
    bars[-1] = bars[-1]._replace(chords=((0, home),))
    return bars


def _progression(plan: _Plan, section: str) -> list[tuple[tuple[int, Chord], ...]]:
    """Return the chords of a section bar by bar; two chords change at the middle (3/4: beat 3)."""
    text = HARMONIES[plan.harmony][{"chorus": 2, "bridge": 3}.get(section, 1)]
    middle = 8 if plan.metre != "6/8" else 6
    return [
        tuple((middle * i, _chord(name, plan.key)) for i, name in enumerate(bar.split()))
        for bar in text.split("|")
    ]


@cache
def _chord(numeral: str, key: int) -> Chord:
    """Read a roman numeral such as bVImaj7 or V/3 (third in the bass)."""
    match = _NUMERAL.match(numeral)
    assert match is not None
    accidental, degree, added, inversion = match.groups()
    root = key + _DEGREES[degree.upper()] + {"b": -1, "#": 1}.get(accidental, 0)
    third = 5 if added == "sus4" else 4 if degree.isupper() else 3
    fifth = 6 if added in ("ø", "o") else 7
    tones = tuple((root + step) % 12 for step in (0, third, fifth, *_ADDED[added or ""]))
    return Chord(tones, tones[{"3": 1, "5": 2}.get(inversion, 0)])


def _rests(rng: np.random.Generator, plan: _Plan) -> frozenset[int]:
    """Return the bars without piano: intro, start of a verse or bridge, at most a quarter."""
    where = str(rng.choice(["none", "intro", "verse", "bridge"], p=[0.2, 0.35, 0.25, 0.2]))
    bars = [i for i, bar in enumerate(plan.bars) if bar.section == where and bar.index < 4][:4]
    return frozenset(bars) if len(bars) <= len(plan.bars) / 4 else frozenset()


def _events(pattern: str) -> list[tuple[int, int, str]]:
    """Return (step, length in steps, symbol) of every note of a pattern."""
    starts = [i for i, symbol in enumerate(pattern) if symbol != "."] + [len(pattern)]
    return [(a, b - a, pattern[a]) for a, b in pairwise(starts) if pattern[a] != "-"]


def _accent(plan: _Plan, step: int) -> float:
    """Return the metrical weight of a sixteenth in the bar."""
    if step == 0:
        return 1.0
    return 0.93 if step % _BEAT[plan.metre] == 0 else 0.85 if step % 2 == 0 else 0.78


class _Writer:
    """Writes notes with small random deviations of time and level."""

    def __init__(
        self,
        rng: np.random.Generator,
        plan: _Plan,
        spread_s: float = 0.006,
        spread_velocity: float = 0.05,
    ):
        self.rng, self.plan, self.spread_s, self.spread_velocity = (
            rng,
            plan,
            spread_s,
            spread_velocity,
        )
        self.notes: list[Note] = []

    def add(
        self,
        bar: int,
        step: float,
        length: float,
        pitches,
        velocity: float,
        ring_s: float = 0.0,
        strum_s: float = 0.0,
        vowel: int = 0,
    ):
        """Write a note or chord; it sounds `ring_s` longer (or shorter) than written."""
        late = min(max(self.spread_s * self.rng.standard_normal(), -0.02), 0.02)
        start, end = self.plan.time(bar, step), self.plan.time(bar, step + length) + ring_s
        for i, pitch in enumerate([pitches] if isinstance(pitches, int) else pitches):
            loud = velocity * (1.0 + self.spread_velocity * self.rng.standard_normal())
            begin = max(0.0, start + late + i * strum_s)
            end_s = min(max(end + late, begin + 0.06), self.plan.duration_s - 0.05)
            if end_s > begin + 0.03:
                self.notes.append(Note(begin, end_s, pitch, min(max(loud, 0.05), 1.0), vowel))


def _lead_voices(plan: _Plan, centre: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return close voicings around `centre`, each nearest to the one before, by (bar, step)."""
    voicings, last = {}, None
    for bar, content in enumerate(plan.bars):
        for step, chord in content.chords:
            last = voicings[bar, step] = _nearest(chord, last, centre)
    return voicings


@lru_cache(maxsize=4096)
def _nearest(chord: Chord, last: tuple[int, ...] | None, centre: int) -> tuple[int, ...]:
    """Return the inversion of a chord that moves the voices least and stays near the centre."""
    choices = []
    for i in range(len(chord.tones)):
        pitches = [chord.tones[i]]
        for tone in chord.tones[i + 1 :] + chord.tones[:i]:
            pitches.append(pitches[-1] + (tone - pitches[-1]) % 12)
        choices += [tuple(p + 12 * octave for p in pitches) for octave in range(3, 7)]
    drift = [abs(sum(c) / len(c) - centre) for c in choices]
    moves = [0.0 if last is None else abs(c[0] - last[0]) + abs(c[-1] - last[-1]) for c in choices]
    return choices[int(np.argmin([d + 0.6 * m for d, m in zip(drift, moves, strict=True)]))]


def _low(tone: int, lowest: int) -> int:
    """Return the pitch of a pitch class at or just above `lowest`."""
    return lowest + (tone - lowest) % 12


def _fits(plan: _Plan, pattern: str) -> bool:
    """Whether a pattern is playable: at most nine strokes per second."""
    return len(_events(pattern)) / (plan.steps * plan.step_s) <= 9.0


def _piano(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write the piano: one style each for verses, choruses and the bridge."""
    styles = {name: style for name, style in PIANOS[plan.metre].items() if _fits(plan, style[1])}
    drawn = [styles[str(name)] for name in rng.choice(list(styles), 3, replace=False)]
    centre = int(rng.integers(64, 76))
    voicings, riff, writer = _lead_voices(plan, centre), _contour(rng, 8), _Writer(rng, plan)
    for bar, content in enumerate(plan.bars[:-1]):
        if bar not in plan.piano_rest:
            style = drawn[{"chorus": 1, "bridge": 2}.get(content.section, 0)]
            _piano_bar(writer, bar, style, voicings, riff)
    _final_chord(
        writer,
        (_low(plan.chord(len(plan.bars), 0).bass, 36), *voicings[len(plan.bars) - 1, 0]),
        0.7,
    )
    return Part(
        "piano", int(rng.choice(_PIANO_PROGRAMS)), writer.notes, float(rng.uniform(-0.25, 0.25))
    )


def _piano_bar(
    writer: _Writer, bar: int, style: tuple[str, str, bool], voicings: dict, riff: list[int]
) -> None:
    """Write both hands of one bar. With the pedal, a note lasts to the next chord."""
    plan = writer.plan
    energy = _ENERGY[plan.bars[bar].section]
    changes = [start for start, _ in plan.bars[bar].chords] + [plan.steps]
    for hand, pattern in enumerate(style[:2]):
        for i, (step, length, symbol) in enumerate(_events(pattern)):
            slot = max(s for s in changes[:-1] if s <= step)
            chord, voices = plan.chord(bar, step), voicings[bar, slot]
            pitches = (
                _right(symbol, voices, chord, plan, riff[i % len(riff)])
                if hand
                else _left(symbol, chord, voices)
            )
            length = min(s for s in changes if s > step) - step if style[2] else length
            velocity = (
                energy
                * _accent(plan, step)
                * (0.72 if symbol.islower() else 0.85)
                * (1.0 if hand else 0.75)
            )
            writer.add(
                bar, step, length, pitches, velocity, 0.12 if style[2] else -0.02, strum_s=0.004
            )


def _left(symbol: str, chord: Chord, voices: tuple[int, ...]) -> list[int]:
    """Return the pitches of a left-hand symbol."""
    root = _low(chord.bass, 41)
    fifth = _low(chord.tones[2], root)
    return {
        "P": [root - 12, root] if root > 47 else [root, root + 12],
        "F": [fifth],
        "O": [root + 12],
        "T": [_low(chord.tones[1], root + 12)],
        "A": [_low(chord.tones[-1], root)],
        "c": list(voices),
    }.get(symbol, [root])


def _right(
    symbol: str, voices: tuple[int, ...], chord: Chord, plan: _Plan, degree: int
) -> list[int]:
    """Return the pitches of a right-hand symbol."""
    if symbol in "Cc":
        return list(voices)
    if symbol == "8":
        return [voices[-1], voices[-1] + 12]
    if symbol == "m":
        pitch = _in_harmony(plan.scale, chord, degree, 72, strong=degree % 2 == 0)
        return [pitch, pitch - 12]
    octave, voice = divmod(int(symbol), len(voices))
    return [voices[voice] + 12 * octave]


def _final_chord(writer: _Writer, pitches, velocity: float) -> None:
    """Write the last bar: one chord that rings to the end."""
    plan = writer.plan
    bar = len(plan.bars) - 1
    writer.add(bar, 0, plan.steps, pitches, velocity, plan.duration_s, strum_s=0.015)


def _contour(rng: np.random.Generator, length: int) -> list[int]:
    """Return a melody as scale steps from its first note: mostly steps, sometimes a leap."""
    moves = [0]
    for _ in range(length - 1):
        back = -np.sign(moves[-1]) if abs(moves[-1]) >= 4 else 0
        moves.append(
            moves[-1]
            + int(
                back
                or rng.choice(
                    [-2, -1, -1, 0, 1, 1, 2, 3, -3],
                    p=[0.1, 0.2, 0.12, 0.1, 0.2, 0.12, 0.1, 0.03, 0.03],
                )
            )
        )
    return moves


@lru_cache(maxsize=4096)
def _in_harmony(
    scale: tuple[int, ...], chord: Chord, degree: int, centre: int, strong: bool
) -> int:
    """Return the pitch of a scale degree over a chord; strong beats get a chord tone."""
    tones = list(scale)
    for tone in chord.tones:
        if tone not in tones:
            distances = [min((tone - other) % 12, (other - tone) % 12) for other in tones]
            tones[int(np.argmin(distances))] = tone
    pitches = sorted(p for p in range(24, 108) if p % 12 in tones)
    home = int(np.argmin([abs(p - centre) for p in pitches]))
    pitch = pitches[min(max(home + degree, 0), len(pitches) - 1)]
    if strong and pitch % 12 not in chord.tones:
        pitch = min(
            (p for p in range(pitch - 4, pitch + 5) if p % 12 in chord.tones),
            key=lambda p: (abs(p - pitch), p),
        )
    return pitch


def _vocals(rng: np.random.Generator, plan: _Plan) -> list[Part]:
    """Write the singer: phrase and answer in verses, a hook in choruses, a second voice there."""
    centre = int(rng.choice([57, 62, 66]))
    tunes = {name: [_tune(rng, plan) for _ in range(2)] for name in ("verse", "chorus", "bridge")}
    lead, second = _Writer(rng, plan, 0.012, 0.04), _Writer(rng, plan, 0.018, 0.04)
    for bar, content in enumerate(plan.bars[:-1]):
        if content.section in tunes and content.index % 2 == 0:
            tune = tunes[content.section][content.index // 2 % 2]
            chorus = content.section == "chorus"
            _sing(lead, bar, tune, centre, 3 if chorus else 0)
            if chorus:
                _sing(second, bar, tune, centre, 1)
    voice = int(rng.choice(_VOICES))
    backing = (
        [Part("vocals", 53, second.notes, float(rng.choice([-0.3, 0.3])), -9.0)]
        if rng.random() < 0.6
        else []
    )
    return [Part("vocals", voice, lead.notes), *(part for part in backing if part.notes)]


def _tune(rng: np.random.Generator, plan: _Plan) -> list[tuple[int, int, int, int]]:
    """Draw two bars of melody: (step, length, scale step, vowel)."""
    rhythm = _events(str(rng.choice(_SINGING[plan.metre])))
    degrees, vowels = _contour(rng, len(rhythm)), rng.integers(N_VOWELS, size=len(rhythm)).tolist()
    return [
        (step, length, degree, vowel)
        for (step, length, _), degree, vowel in zip(rhythm, degrees, vowels, strict=False)
    ]


def _sing(
    writer: _Writer, bar: int, tune: list[tuple[int, int, int, int]], centre: int, lift: int
) -> None:
    """Write two bars of melody over their chords, slightly legato."""
    plan = writer.plan
    for step, length, degree, vowel in tune:
        at, within = bar + step // plan.steps, step % plan.steps
        strong = within % _BEAT[plan.metre] == 0 or length >= 4
        pitch = _in_harmony(plan.scale, plan.chord(at, within), degree + lift, centre, strong)
        velocity = (0.6 + 0.2 * _ENERGY[plan.bars[min(at, len(plan.bars) - 1)].section]) * _accent(
            plan, within
        )
        writer.add(at, within, length, pitch, velocity, 0.03, vowel=vowel)


def _drums(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write the drummer: a loop, fills before new sections, crashes on their first beat."""
    groove, writer = GROOVES[plan.groove], _Writer(rng, plan, 0.004, 0.07)
    silent_intro = bool(rng.random() < 0.5)
    fills = _FILLS[6 if plan.metre == "6/8" else 8]
    fill = [str(f) for f in rng.choice(fills, 2, replace=False)]
    for bar, content in enumerate(plan.bars[:-1]):
        if content.section == "intro" and silent_intro and not content.last:
            continue
        start = plan.steps - len(fill[0]) if content.last else plan.steps
        _beat(writer, bar, groove["lines"], start)
        if content.last:
            _fill(writer, bar, start, fill[content.section == "chorus"])
        if content.index == 0 and content.section != "intro":
            writer.add(bar, 0, 1, _CRASH, 0.8, 3.0)
    writer.add(len(plan.bars) - 1, 0, 1, [_CRASH, _KICK], 0.75, 3.0)
    return Part("drums", int(rng.choice(groove["kits"])), writer.notes, drums=True)


def _beat(writer: _Writer, bar: int, lines: dict[int, str], stop: int) -> None:
    """Write one bar of the loop up to a step; choruses use the ride instead of the hi-hat."""
    section = writer.plan.bars[bar].section
    for key, line in lines.items():
        key = _RIDE if key == _HAT and section == "chorus" and "xo" not in line else key
        for step, _, symbol in _events(line):
            if step < stop and not (section == "intro" and key in (_SNARE, _CLAP)):
                loud = {"X": 1.0, "x": 0.78, "o": 0.42}[symbol] * (0.75 + 0.25 * _ENERGY[section])
                writer.add(
                    bar,
                    step,
                    1,
                    key,
                    loud * (0.8 if key in (_HAT, _OPEN, _RIDE) else 1.0),
                    DRUM_RING_S[key],
                )


def _fill(writer: _Writer, bar: int, start: int, pattern: str) -> None:
    """Write a fill on snare and toms, with a crescendo."""
    for step, _, symbol in _events(pattern):
        key = _TOMS[int(symbol)] if symbol.isdigit() else _SNARE
        writer.add(bar, start + step, 1, key, 0.6 + 0.3 * step / len(pattern), DRUM_RING_S[key])


def _bass(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write the bass: the groove's figure over the bass notes, leading into the next chord."""
    figure = BASSES[plan.metre][str(rng.choice(GROOVES[plan.groove]["bass"]))]
    kind = {
        **dict.fromkeys(("swing", "jazzwaltz", "bossa", "train"), "upright"),
        "fourfloor": "synth",
        "halftime": "synth",
    }
    silent_intro = len(plan.bars) > 8 and bool(rng.random() < 0.6)
    writer = _Writer(rng, plan, 0.005, 0.05)
    for bar, content in enumerate(plan.bars[:-1]):
        if not (content.section == "intro" and silent_intro):
            for step, length, symbol in _events(figure):
                pitch = _bass_pitch(plan, bar, step, symbol)
                loud = 0.8 * _accent(plan, step) * (0.8 if symbol.islower() else 1.0)
                writer.add(
                    bar, step, length, pitch, loud * (0.8 + 0.2 * _ENERGY[content.section]), -0.015
                )
    _final_chord(writer, [_low(plan.chord(len(plan.bars), 0).bass, 28)], 0.75)
    return Part(
        "bass",
        int(rng.choice(_BASS_PROGRAMS[kind.get(plan.groove, "electric")])),
        writer.notes,
        0.0,
    )


def _bass_pitch(plan: _Plan, bar: int, step: int, symbol: str) -> int:
    """Return the pitch of a bass symbol between E1 and E3."""
    chord = plan.chord(bar, step)
    root = _low(chord.bass, 28)
    symbol = symbol.upper()
    if symbol == "A":
        target = _low(plan.chord(bar + 1, 0).bass, 28)
        return target + (1 if target < root else -1) if target != root else _low(chord.tones[2], 28)
    return {
        "R": root,
        "O": root + 12,
        "F": _low(chord.tones[2], root),
        "T": _low(chord.tones[1], root),
        "S": _low(chord.tones[-1], root),
    }[symbol]


def _others(rng: np.random.Generator, plan: _Plan) -> list[Part]:
    """Write the other players, in the piano's register: pad, rhythm player, lead."""
    side = float(rng.choice([-1.0, 1.0]))
    parts = [_pad(rng, plan), _rhythm(rng, plan), _lead(rng, plan)]
    for part, pan in zip(parts, (0.0, 0.45 * side, -0.3 * side), strict=True):
        part.pan = pan
    return parts


def _pad(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write long chords without their lowest voice: in choruses, bridges, late verses."""
    voicings, writer = (
        _lead_voices(plan, int(rng.choice([57, 64, 70, 74]))),
        _Writer(rng, plan, 0.015),
    )
    first = {"chorus": 0, "bridge": 0, "outro": 0, "verse": int(rng.choice([4, 99])), "intro": 99}
    for bar, content in enumerate(plan.bars[:-1]):
        changes = [start for start, _ in content.chords] + [plan.steps]
        for start, stop in pairwise(changes):
            if content.index >= first[content.section]:
                writer.add(
                    bar,
                    start,
                    stop - start,
                    voicings[bar, start][1:],
                    0.65 * _ENERGY[content.section],
                    0.1,
                )
    _final_chord(writer, voicings[len(plan.bars) - 1, 0], 0.5)
    return Part("other", int(rng.choice(_PADS)), writer.notes, gain_db=-1.0)


def _rhythm(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write a guitar, organ or mallet figure that repeats every bar."""
    patterns = [p for p in _COMPS[plan.metre] if _fits(plan, p)]
    chosen = [str(p) for p in rng.choice(patterns, 2, replace=False)]
    program = int(rng.choice(_RHYTHM))
    voicings, writer = (
        _lead_voices(plan, int(rng.choice([57, 63, 69, 74]))),
        _Writer(rng, plan, 0.008),
    )
    silent = [("intro", "bridge"), ("intro", "verse"), ("chorus", "outro"), ("intro", "outro")][
        rng.integers(4)
    ]
    for bar, content in enumerate(plan.bars[:-1]):
        for step, length, symbol in (
            _events(chosen[content.section == "chorus"]) if content.section not in silent else ()
        ):
            slot = max(start for start, _ in content.chords if start <= step)
            voices = voicings[bar, slot]
            pitches = (
                voices if symbol in "Cc" else _right(symbol, voices, plan.chord(bar, step), plan, 0)
            )
            loud = (
                0.8
                * _ENERGY[content.section]
                * _accent(plan, step)
                * (0.75 if symbol == "c" else 1.0)
            )
            writer.add(
                bar,
                step,
                length,
                pitches,
                loud,
                0.05,
                strum_s=0.012 if 24 <= program <= 31 else 0.003,
            )
    return Part("other", program, writer.notes)


def _lead(rng: np.random.Generator, plan: _Plan) -> Part:
    """Write a melody instrument: the tune of intro and outro, answers in the singer's pauses."""
    tune, answer = _tune(rng, plan), _contour(rng, 4)
    writer, centre = _Writer(rng, plan, 0.01), int(rng.integers(65, 74))
    for bar, content in enumerate(plan.bars[:-1]):
        if (
            content.section in ("intro", "outro")
            and content.index % 2 == 0
            and bar + 1 < len(plan.bars)
        ):
            _sing(writer, bar, tune, centre, 0)
        elif content.index % 4 == 3:
            for i, degree in enumerate(answer):
                step = plan.steps - 8 + 2 * i
                writer.add(
                    bar,
                    step,
                    2,
                    _in_harmony(plan.scale, plan.chord(bar, step), degree + 2, centre, i % 2 == 0),
                    0.6,
                    0.02,
                )
    return Part("other", int(rng.choice(_LEADS)), writer.notes, gain_db=1.0)
