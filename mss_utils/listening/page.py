"""`listening.html`: all excerpts and demonstrations of a run in one file, with the blind test."""

import json
from collections.abc import Mapping
from html import escape

import pandas as pd

from mss_utils.config import Run
from mss_utils.data import Store
from mss_utils.figures import LABELS, SHORT_LABELS, SHOWN_METRICS
from mss_utils.files import write_text
from mss_utils.listening import blind_test, demonstrations
from mss_utils.listening.blind_test import ANCHOR, RATED
from mss_utils.listening.excerpts import EQUAL_DB, Excerpt, equal_score_pair, track_excerpt
from mss_utils.listening.player import WEB, audio_html, document, fill, player_html

Excerpts = Mapping[str, Mapping[str, Excerpt]]  # target -> rule -> excerpt


def write_page(run: Run, store: Store, tracks: pd.DataFrame, excerpts: Excerpts) -> str:
    """Write `listening.html` of a run and return its text; `tracks` is the table of that name."""
    text = listening_page(run, store, tracks, excerpts, run.name, blind_test.weights_digest(run))
    write_text(run.folder / "listening.html", text)
    return text


def listening_page(
    run: Run, store: Store, tracks: pd.DataFrame, excerpts: Excerpts, name: str, models: str | None
) -> str:
    """Return the page of `write_page`; responses name the run `name` and the weights `models`."""
    sections, tested = "", []
    for target, by_rule in excerpts.items():
        players, pages = _excerpts(target, by_rule, store.sample_rate, len(tested))
        tested += pages
        values = dict(target=escape(target), excerpts=players)
        values["pair"] = _pair(run, store, target, tracks)
        sections += fill("target.html", **values, **_demonstrations(run, store, target))
    names = {version: LABELS.get(version, version) for version in RATED}
    names[ANCHOR] += f" (mixture up to {blind_test.ANCHOR_HZ / 1000:g} kHz)"
    letters = blind_test.VERSION_LETTERS
    test = json.dumps(dict(run=name, models=models, pages=tested, names=names, letters=letters))
    body = fill(
        "page.html",
        targets=escape(" and ".join(excerpts)),
        run=escape(name),
        keys=fill("keys.html"),
        sections=sections,
        excerpts=f"{len(tested)} excerpt{'s' * (len(tested) != 1)}",
        n=len(RATED),
        licence=escape((WEB / "vendor" / "LICENSE").read_text(encoding="utf-8")),
        test=test.replace("<", r"\u003c"),  # no name can end the script
    )
    return document(body, f"Listening: {name}", blind_test=True)


def _excerpts(
    target: str, by_rule: Mapping[str, Excerpt], sample_rate: int, first: int
) -> tuple[str, list[dict]]:
    """Return a player and a hidden low anchor per track, and what to rate in the blind test."""
    html, tested = "", []
    for number, excerpt in enumerate({e.track: e for e in by_rule.values()}.values(), first):
        track, figure = excerpt.track, f"excerpt-{number}"
        rules = ", ".join(rule for rule, other in by_rule.items() if other.track == track)
        lead = f"{rules}; from {excerpt.start_s:.1f} s of the track"
        player = player_html(track, excerpt.versions, sample_rate, excerpt.scores, lead)
        anchor = blind_test.low_anchor(excerpt.versions["mixture"], sample_rate)
        anchor = f'<div data-version="{ANCHOR}">{audio_html(anchor, sample_rate, ANCHOR)}</div>'
        html += f'<div id="{figure}">{player}<div hidden>{anchor}</div></div>'
        tested.append(dict(figure=figure, track=track, target=target, versions=RATED))
    return html, tested


def _pair(run: Run, store: Store, target: str, tracks: pd.DataFrame) -> str:
    """Return a player of two models with equal SDR that sound different."""
    pair = equal_score_pair(tracks, target)
    if pair is None:
        return f"<p>No two models are within {EQUAL_DB:g} dB of SDR on any test track.</p>"
    name, *models = pair
    rows = tracks[tracks["target"].eq(target) & tracks["track"].eq(name) & tracks["seed"].eq(0)]
    scores = rows.set_index("model").loc[models, list(SHOWN_METRICS)]
    versions = track_excerpt(run, store, target, name).versions
    versions = {version: versions[version] for version in ("mixture", "reference", *models)}
    player = player_html(name, versions, store.sample_rate, scores.to_dict("index"))
    first, second = (SHORT_LABELS[model] for model in models)
    return fill("pair.html", first=first, second=second, equal_db=f"{EQUAL_DB:g}", player=player)


def _demonstrations(run: Run, store: Store, target: str) -> dict[str, str]:
    """Return the players of the three questions by placeholder in `target.html`."""
    parts = {
        "phase": (demonstrations.phase_swap, "phase", "Model A has no estimate to improve."),
        "repeat": (demonstrations.damaged_repeat, "repetition", "Not askable: see notebook 05."),
        "attack": (demonstrations.attacks, "attack", "No isolated onset in this run."),
    }
    players = {}
    for key, (demonstrate, table, missing) in parts.items():
        name, columns = demonstrate(run, store, target, pd.read_csv(run.table(table)))
        players[key] = "" if columns else f"<p>{missing}</p>"
        for heading, versions in columns.items():
            players[key] += player_html(heading, versions, store.sample_rate, lead=name)
    return players
