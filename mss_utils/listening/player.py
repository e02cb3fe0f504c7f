"""The switching player: every version of an excerpt as mp3, played in step under one transport.

The HTML made here is self-contained: it plays in JupyterLab, in an exported notebook and from disk.
"""

import base64
import io
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import soundfile
from IPython.display import HTML
from scipy.signal import resample_poly

from mss_utils.figures import COLOURS, LABELS, format_db

PEAK_DB = -1.0
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
SOUND = "data:audio/mpeg;base64,"  # prefix of the audio data in a page
WEB = Path(__file__).parent / "web"
VENDOR = [f"vendor/{name}.min.js" for name in ("wavesurfer", "regions", "spectrogram")]
Versions = Mapping[str, np.ndarray]  # version -> (channels, samples)
Scores = Mapping[str, Mapping[str, float]]  # version -> metric -> dB


def common_gain(versions: Versions) -> float:
    """Return the one factor that brings the loudest version or residual to `PEAK_DB`.

    A factor for each version would compare models at different levels, and louder sounds better.
    """
    mixture = versions.get("mixture", 0)
    signals = [*versions.values(), *(mixture - audio for audio in versions.values())]
    peak = max(float(np.abs(audio).max(initial=0)) for audio in signals)
    return 10 ** (PEAK_DB / 20) / (peak or 1.0)


def mp3_rate(sample_rate: int) -> int:
    """Return the sample rate of a signal as mp3: its own if mp3 has it, else 48 kHz."""
    return sample_rate if sample_rate in MP3_RATES else MP3_RATES[-1]


def encode_mp3(audio: np.ndarray, sample_rate: int, compression: float = 0.1) -> bytes:
    """Encode `(channels, samples)` as mp3; more than two channels become their mean.

    `compression` is from 0 (largest, best) to 1.
    """
    if len(audio) > 2:
        audio = audio.mean(axis=0, keepdims=True)
    rate = mp3_rate(sample_rate)
    audio = resample_poly(audio, rate, sample_rate, axis=1)
    # A variable bit rate has constant quality, and it alone of LAME's modes keeps the level.
    options = dict(format="MP3", bitrate_mode="VARIABLE", compression_level=compression)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio.T, -1, 1), rate, **options)
    return buffer.getvalue()


def reencode(page: str, compression: float) -> str:
    """Encode the sounds of a page again, smaller; levels and lengths stay."""

    def smaller(match: re.Match) -> str:
        mp3 = io.BytesIO(base64.b64decode(match[1]))
        audio, rate = soundfile.read(mp3, dtype="float32", always_2d=True)
        return SOUND + base64.b64encode(encode_mp3(audio.T, rate, compression)).decode()

    return re.sub(re.escape(SOUND) + "([A-Za-z0-9+/=]+)", smaller, page)


def players(
    columns: Mapping[str, Versions], sample_rate: int, scores: Mapping[str, Scores] | None = None
) -> HTML:
    """Return one player per heading for a notebook; the versions of a player share one gain.

    `columns` is `{heading: {version: (channels, samples)}}`, `scores` the same with `{metric: dB}`.
    """
    body = fill("keys.html")
    for heading, versions in columns.items():
        body += player_html(heading, versions, sample_rate, (scores or {}).get(heading))
    return frame(document(body, "Players"), "players: " + ", ".join(columns))


def player_html(
    title: str, versions: Versions, sample_rate: int, scores: Scores | None = None, lead: str = ""
) -> str:
    """Return the HTML of one player; without JavaScript it is a list of plain audio elements."""
    gain, items = np.float32(common_gain(versions)), ""
    for name, audio in versions.items():
        label, colour = LABELS.get(name, name), COLOURS.get(name, "#b8bec5")
        cells = ""
        for metric, value in (scores or {}).get(name, {}).items():
            cells += f"<span>{escape(metric)} {escape(format_db(value))}</span>"
        sound = audio_html(audio * gain, sample_rate, f"{label}, {title}")
        values = dict(version=escape(name), label=escape(label), colour=colour)
        items += fill("version.html", **values, scores=cells, audio=sound)
    values = dict(title=escape(title), lead=escape(lead), rate=mp3_rate(sample_rate), items=items)
    return fill("player.html", **values, layout="scored" if scores else "")


def audio_html(audio: np.ndarray, sample_rate: int, label: str) -> str:
    """Return an audio element with the audio inside, at its own level."""
    mp3 = base64.b64encode(encode_mp3(audio, sample_rate)).decode()
    return fill("audio.html", label=escape(label), mp3=mp3)


def fill(template: str, **values: object) -> str:
    """Fill in a template of the folder `web`; values are HTML, so text is escaped before."""
    return Template((WEB / template).read_text(encoding="utf-8")).substitute(values)


def document(body: str, title: str, blind_test: bool = False) -> str:
    """Return a page with its style and scripts inside; `blind_test` marks the listening page."""
    files = ["page.css", *VENDOR, "player.js"] + ["blind.js"] * blind_test
    style, *scripts = ((WEB / file).read_text(encoding="utf-8") for file in files)
    values = dict(title=escape(title), body=body, style=style, script="\n".join(scripts))
    return fill("document.html", layout="page" if blind_test else "", **values)


def frame(page: str, title: str, height: int = 480) -> HTML:
    """Return a page in an iframe for a notebook; its script sets the height to fit."""
    return HTML(fill("frame.html", page=escape(page), title=escape(title), height=height))
