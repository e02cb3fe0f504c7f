"""The switching player: every version of an excerpt as a small mp3, and the scripts that play them under one transport.

What is made here is one piece of HTML with everything inside: it plays in JupyterLab, in an exported notebook, and from disk.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from IPython.display import HTML

from mss_utils.figures import COLOURS, LABELS

PEAK_DB = -1.0
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
SOUND = "data:audio/mpeg;base64,"  # how the sounds of a page begin
WEB = Path(__file__).parent / "web"
SCRIPTS = (
    "vendor/wavesurfer.min.js",
    "vendor/regions.min.js",
    "vendor/spectrogram.min.js",
    "player.js",
)
# Nothing is fetched and no script but those of the page runs, whatever a track is called.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; media-src data:; img-src data:"
KEYS = (
    "<p class='small'>Keys: <kbd>1</kbd> to <kbd>9</kbd> version, <kbd>space</kbd> play and pause, <kbd>r</kbd> residual, <kbd>←</kbd> "
    "<kbd>→</kbd> one second, <kbd>[</kbd> <kbd>]</kbd> ends of the loop, <kbd>Esc</kbd> loop all. Drag over the waveform to loop a stretch.</p>"
)

Notes = Mapping[str, Mapping[str, str]]  # version -> {what: value}, shown beside it


def common_gain(versions: Mapping[str, np.ndarray], peak_db: float = PEAK_DB) -> float:
    """The one factor that brings the loudest sample of all versions to `peak_db` below full scale; 1 for silence.

    Never one factor each: louder sounds better, and models would be compared at different levels.
    """
    peak = max(float(np.abs(audio).max(initial=0)) for audio in versions.values())
    return 10 ** (peak_db / 20) / peak if peak > 0 else 1.0


def gain_with_residuals(versions: Mapping[str, np.ndarray]) -> float:
    """The common gain of all versions and, where there is a mixture, of mixture minus version, which can be louder than both."""
    rest = (
        {f"{name} residual": versions["mixture"] - audio for name, audio in versions.items()}
        if "mixture" in versions
        else {}
    )
    return common_gain({**versions, **rest})


def coded_rate(sample_rate: int) -> int:
    """The rate that mp3 has for a signal: its own, or 48 kHz."""
    return sample_rate if sample_rate in MP3_RATES else MP3_RATES[-1]


def encode_mp3(audio: np.ndarray, sample_rate: int, compression: float = 0.1) -> bytes:
    """`(channels, samples)` in full-scale floats as mp3: about 6 kB a second in mono at 16 kHz, at most 26 kB in stereo at 44.1 kHz.

    `compression` goes from 0, largest and best, to 1. More than two channels become their mean, and the rate becomes `coded_rate`: mp3 knows no other way.
    """
    audio, rate = (
        audio if len(audio) <= 2 else audio.mean(axis=0, keepdims=True),
        coded_rate(sample_rate),
    )
    if rate != sample_rate:
        audio = torchaudio.functional.resample(
            torch.from_numpy(np.ascontiguousarray(audio)), sample_rate, rate
        ).numpy()
    buffer = io.BytesIO()
    # A variable rate holds the quality, so that no version suffers more from the coding than another; and of LAME's modes it
    # alone leaves the level as it is.
    soundfile.write(
        buffer,
        np.clip(audio.T, -1, 1),
        rate,
        format="MP3",
        bitrate_mode="VARIABLE",
        compression_level=compression,
    )
    return buffer.getvalue()


def players(
    columns: Mapping[str, Mapping[str, np.ndarray]],
    sample_rate: int,
    notes: Mapping[str, Notes] | None = None,
) -> HTML:
    """Players below each other for a notebook: `{heading: {version: (channels, samples)}}`, one player a heading.

    All versions of a player, and the residuals it makes where there is a mixture, share one gain. `notes` has for a heading and
    version what stands beside it. Names are escaped.
    """
    notes = notes or {}
    body = "".join(
        figure(heading, versions, sample_rate, notes.get(heading))
        for heading, versions in columns.items()
    )
    return frame(
        document(KEYS + body, "Players", ["startPlayers()"]), "players: " + ", ".join(columns)
    )


def figure(
    title: str,
    versions: Mapping[str, np.ndarray],
    sample_rate: int,
    notes: Notes | None = None,
    lead: str = "",
    more: str = "",
    identity: str = "",
) -> str:
    """HTML of one player. `lead` is text under the title, `more` HTML behind the versions, `identity` what scripts find it by.

    Where scripts do not run, it is a list of plain players.
    """
    gain = np.float32(gain_with_residuals(versions))
    rows = []
    for name, audio in versions.items():
        sound = audio_tag(audio * gain, sample_rate, f"{LABELS.get(name, name)}, {title}")
        rows.append(
            f'<li data-version="{_attribute(name)}">{_chip(name)}{_scores((notes or {}).get(name, {}))}{sound}</li>'
        )
    caption = f"<h3>{html.escape(title)}</h3>" + (f"<p>{html.escape(lead)}</p>" if lead else "")
    found_by = f'id="{identity}" ' if identity else ""
    return (
        f'<figure class="player" {found_by}data-rate="{coded_rate(sample_rate)}" aria-label="{_attribute(title)}"><figcaption>{caption}</figcaption>'
        f'<ol class="versions{" scored" if notes else ""}">{"".join(rows)}</ol>{more}</figure>'
    )


def audio_tag(audio: np.ndarray, sample_rate: int, label: str) -> str:
    """HTML of the audio itself, as a plain player, at the level it has."""
    data = base64.b64encode(encode_mp3(audio, sample_rate)).decode()
    return f'<audio controls preload="none" aria-label="{_attribute(label)}" src="{SOUND}{data}"></audio>'


def recoded(page: str, compression: float) -> str:
    """A page whose sounds are coded again, smaller; they keep their level and stay in step with each other."""

    def again(found: re.Match) -> str:
        audio, rate = soundfile.read(
            io.BytesIO(base64.b64decode(found[1])), dtype="float32", always_2d=True
        )
        return SOUND + base64.b64encode(encode_mp3(audio.T, rate, compression)).decode()

    return re.sub(re.escape(SOUND) + "([A-Za-z0-9+/=]+)", again, page)


def document(
    body: str, title: str, calls: list[str], scripts: tuple[str, ...] = SCRIPTS, kind: str = ""
) -> str:
    """A page with its style and scripts inside; `calls` are run at its end."""
    code = "\n".join((WEB / script).read_text(encoding="utf-8") for script in scripts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f'<style>{(WEB / "page.css").read_text(encoding="utf-8")}</style></head><body class="{kind}">{body}'
        f"<script>{code}</script><script>{';'.join(calls)}</script></body></html>"
    )


def frame(page: str, title: str, height: int = 480) -> HTML:
    """A page within a notebook: its style and keys stay its own, and it sets its own height once it runs."""
    return HTML(
        f'<div><iframe srcdoc="{_attribute(page)}" title="{_attribute(title)}" style="width:100%;height:{height}px;border:0" '
        f'allow="autoplay"></iframe></div>'
    )


def _chip(name: str) -> str:
    """The display name behind a square of the version's colour."""
    return f'<span class="chip" style="background:{COLOURS.get(name, "#b8bec5")}"></span><span class="name">{html.escape(LABELS.get(name, name))}</span>'


def _scores(notes: Mapping[str, str]) -> str:
    cells = "".join(
        f"<span>{html.escape(what)} {html.escape(value)}</span>" for what, value in notes.items()
    )
    return f'<span class="scores">{cells}</span>' if notes else ""


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)
