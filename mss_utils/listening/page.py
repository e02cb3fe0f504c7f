"""`listening.html`: everything there is to hear of a run in one file, and the blind test with the same sounds.

Taught in notebook 06, which shows the same page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping

import pandas as pd

from mss_utils.config import Run
from mss_utils.data import Store
from mss_utils.figures import LABELS, SHORT_LABELS
from mss_utils.figures.style import SHOWN_METRICS
from mss_utils.files import write_text
from mss_utils.listening.blind_test import (
    ANCHOR,
    ANCHOR_HZ,
    LETTERS_SHOWN,
    RATED,
    low_anchor,
    models_of,
)
from mss_utils.listening.demonstrations import (
    Heard,
    attack_versions,
    phase_versions,
    repeat_versions,
)
from mss_utils.listening.excerpts import SAME_DB, Excerpt, same_score, track_excerpt, track_named
from mss_utils.listening.player import KEYS, SCRIPTS, WEB, audio_tag, document, figure

EXCERPTS_TEXT = """
<h2>{target}: excerpts</h2>
<p>Start with the mixture, then the reference, so that your ear knows what it is looking for. Then the models: can you still follow
another instrument (interference)? Is there warbling, hiss or roughness (artifacts)? Does a note begin as sharply as in the reference?
Does the {target} vanish where something else is loud? The residual is the mixture minus what is heard: what of the {target} is left in it?</p>
<p>Tracks are chosen by rules, the seconds by where the {target} is loudest. Scores are those of just these seconds, the median over
seconds, in dB; higher is better.</p>
"""
PHASE_TEXT = """
<h3>Phase: is the time domain crisper?</h3>
<p>The track on which the true phase would bring model A most. What a model's magnitude with the <b>true phase</b> sounds cleaner
than the model as it is, is the price of its phase; what is rough in the <b>true magnitude with its phase</b> is phase alone.</p>
"""
REPEAT_TEXT = """
<h3>Repetition: does attention use what comes again?</h3>
<p>A loop whose middle is covered by other instruments, on the track where B1 and B2 differ most in what a repeat is worth to them.
Does a model find the covered stretch better when its <b>repeat</b> stands around it than among <b>other music</b> or in <b>silence</b>?
Drag over the middle to loop it.</p>
"""
ATTACK_TEXT = """
<h3>Attack: who keeps the beginning of a note?</h3>
<p>Three seconds with many attacks, from the track on which B1 is furthest ahead of A at attacks, compared with what follows them; then
the same at half the speed, an octave lower. Listen to how notes begin: with a click as in the reference, or fading in?</p>
"""
BLIND_TEXT = """
<div class="before card"><h2>Blind test</h2>
<p>You will hear {pages}, each in {n} unnamed versions, and give every version a number from 0 (bad) to 100 (excellent) for how close it is
to the reference. One of the letters <i>is</i> the reference: rate it 100. One is spoilt on purpose: the mixture without its treble.
Listen over headphones in a quiet room, loop what you want to compare, and take your time: about two minutes an excerpt.</p>
<p>Do this before you listen to the named versions. Answers leave this page only as a file that you download at the end and hand to
whoever asked you.</p>
<p><label>Your name or a pseudonym, if you like<input type="text" maxlength="60" autocomplete="off"></label></p>
<button type="button" class="main start">Begin</button></div>
<div class="stage"></div>
"""


def write_page(
    run: Run, store: Store, tracks: pd.DataFrame, found: Mapping[str, Mapping[str, Excerpt]]
) -> str:
    """Write `listening.html` of a run and return its text; `found` is `{target: {rule: excerpt}}`, `tracks` the table of that name."""
    text = listening_page(run, store, tracks, found, run.name, models_of(run))
    write_text(run.folder / "listening.html", text)
    return text


def listening_page(
    run: Run,
    store: Store,
    tracks: pd.DataFrame,
    found: Mapping[str, Mapping[str, Excerpt]],
    name: str,
    models: str | None,
) -> str:
    """The page of `write_page`; answers of its blind test are about the run called `name`, and about `models`, see `models_of`."""
    listen, pages = "", []
    for target, by_rule in found.items():
        section, tested = excerpts_section(target, by_rule, store.sample_rate, len(pages))
        listen += (
            section
            + _pair_section(run, store, target, tracks)
            + _questions_section(run, store, target)
        )
        pages += tested
    return page_of(name, models, list(found), listen, pages)


def page_of(
    name: str, models: str | None, targets: list[str], listen: str, pages: list[dict]
) -> str:
    """The page of a run of that `name`: the view `listen`, and the blind test on the excerpts that `pages` name, see `excerpts_section`."""
    body = (
        f"<header><h1>Listening: {html.escape(' and '.join(targets))}</h1><p>Run <b>{html.escape(name)}</b>. All versions in a player run together "
        f"and have one common gain: switching keeps the position, and a model that sounds quieter <i>is</i> quieter.</p>{KEYS}"
        '<nav aria-label="views"><button type="button" data-view="listen">Listen</button>'
        '<button type="button" data-view="blind">Blind test</button></nav></header>'
        f'<main><section id="listen">{listen}</section><section id="blind" hidden>{_blind_section(pages)}</section></main>'
        f"{_footer()}{_json(dict(run=name, models=models, pages=pages))}"
    )
    return document(
        body,
        f"Listening: {name}",
        ["startPlayers()", "startBlindTest()"],
        (*SCRIPTS, "blind.js"),
        "page",
    )


def excerpts_section(
    target: str, by_rule: Mapping[str, Excerpt], sample_rate: int, first: int
) -> tuple[str, list[dict]]:
    """Players of the excerpts, and for the blind test which sounds of which player are rated."""
    rules = {}
    for rule, excerpt in by_rule.items():
        rules.setdefault(excerpt.track, (excerpt, []))[1].append(rule)
    text, pages = EXCERPTS_TEXT.format(target=html.escape(target)), []
    for number, (track, (excerpt, its_rules)) in enumerate(rules.items(), first):
        anchor = audio_tag(
            low_anchor(excerpt.versions["mixture"], sample_rate), sample_rate, "low anchor"
        )
        hidden = f'<div hidden data-version="{ANCHOR}">{anchor}</div>'
        lead = f"{', '.join(its_rules)}; from {excerpt.start_s:.1f} s of the track"
        text += figure(
            track, excerpt.versions, sample_rate, excerpt.notes, lead, hidden, f"excerpt-{number}"
        )
        pages.append(dict(figure=f"excerpt-{number}", track=track, target=target, versions=RATED))
    return text, pages


def _pair_section(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> str:
    """Two models with the same SDR that sound different."""
    pair = same_score(tracks, target)
    title = f"<h2>{html.escape(target)}: same score, different sound</h2>"
    if pair is None:
        return f"{title}<p>No two models are within {SAME_DB:g} dB of SDR on any test track.</p>"
    name, *models = pair
    rows = tracks[
        (tracks["target"] == target) & (tracks["track"] == name) & (tracks["seed"] == 0)
    ].set_index("model")
    scores = rows.loc[models, list(SHOWN_METRICS)].to_dict("index")
    excerpt = track_excerpt(
        run, store, target, track_named(store, name), ("mixture", "reference", *models), scores
    )
    text = (
        f"<p>On this track {SHORT_LABELS[models[0]]} and {SHORT_LABELS[models[1]]} are within {SAME_DB:g} dB of SDR, and of all such pairs differ most in how they "
        "are wrong: a higher SIR means less of the other instruments, a higher SAR fewer artifacts. Scores are those of the whole track. "
        "Which would you keep?</p>"
    )
    return title + text + figure(name, excerpt.versions, store.sample_rate, excerpt.notes)


def _questions_section(run: Run, store: Store, target: str) -> str:
    table = lambda name: pd.read_csv(run.table(name))
    parts = (
        (
            PHASE_TEXT,
            phase_versions(run, store, target, table("phase")),
            "No estimate of A has a phase to mend.",
        ),
        (
            REPEAT_TEXT,
            repeat_versions(run, store, target, table("long_range")),
            "Not askable in this run, see notebook 05.",
        ),
        (
            ATTACK_TEXT,
            attack_versions(run, store, target, table("transients")),
            "No onset in this run has rest before it.",
        ),
    )
    return f"<h2>{html.escape(target)}: the three questions</h2>" + "".join(
        _question(text, heard, store.sample_rate, instead) for text, heard, instead in parts
    )


def _question(text: str, heard: Heard, sample_rate: int, instead: str) -> str:
    name, columns = heard
    shown = "".join(
        figure(heading, versions, sample_rate, lead=name) for heading, versions in columns.items()
    )
    return text + (shown or f"<p>{instead}</p>")


def _blind_section(pages: list[dict]) -> str:
    count = f"{len(pages)} excerpt{'s' * (len(pages) != 1)}"
    return BLIND_TEXT.format(pages=count, n=len(RATED))


def _json(test: dict) -> str:
    """What blind.js reads. Without a "<" no name can end the script."""
    names = {name: LABELS.get(name, name) for name in RATED} | {
        ANCHOR: f"low anchor (mixture up to {ANCHOR_HZ / 1000:g} kHz)"
    }
    text = json.dumps(test | dict(names=names, letters=LETTERS_SHOWN)).replace("<", r"\u003c")
    return f'<script type="application/json" id="test">{text}</script>'


def _footer() -> str:
    licence = html.escape((WEB / "vendor" / "LICENSE").read_text(encoding="utf-8"))
    return (
        "<footer><p class='small'>Coded as mp3 with one quality for all; a residual is the difference of two coded signals and has the coding "
        "noise of both, some 20 dB below it. Blind test after ITU-R BS.1534-3.</p>"
        f"<details class='small'><summary>wavesurfer.js draws the pictures; its licence</summary><pre class='wide'>{licence}</pre></details></footer>"
    )
