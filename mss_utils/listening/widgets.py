"""Menus and upload fields of notebook 06, for a running notebook; in an exported page only their first state remains."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import ipywidgets
import numpy as np
import soundfile
from IPython.display import HTML, display

from mss_utils.config import MODELS, Run, expand_path
from mss_utils.data import Store, Track, loudest_start
from mss_utils.figures import LABELS
from mss_utils.files import atomic_write, safe_name
from mss_utils.listening.blind_test import add_answers, opinion_sentence, ratings_of
from mss_utils.listening.excerpts import Excerpt, excerpt_players, scored_excerpt
from mss_utils.listening.player import players
from mss_utils.separation import trained_model
from mss_utils.separation.song_files import bandwidth_note, separate_file


def chooser(
    run: Run, store: Store, target: str, excerpt_of: Callable[[Track], Excerpt] | None = None
) -> None:
    """A menu of all test tracks; the player below follows it. Separates on demand.

    Displays the menu (empty in an exported page) and, as plain output, the first state, which every copy of the page keeps.
    `excerpt_of` makes the excerpt of a track; by default `scored_excerpt` of this run.
    """
    excerpt_of = lru_cache(maxsize=8)(
        excerpt_of or (lambda track: scored_excerpt(run, store, target, track))
    )
    view = lambda track: excerpt_players(
        {f"from {excerpt_of(track).start_s:.0f} s": excerpt_of(track)}, store.sample_rate
    )
    tracks = store.split("test")
    menu = ipywidgets.Dropdown(
        options=[(track.name, track) for track in tracks], description="track"
    )
    display(menu)
    below = display(view(menu.value), display_id=True)

    def update(_change) -> None:
        below.update(HTML(f"Separating {html.escape(menu.value.name)} …"))
        below.update(view(menu.value))

    menu.observe(update, names="value")


def answers_field(run: Run) -> None:
    """An upload field for the files that listeners downloaded; says what listeners think."""
    upload = ipywidgets.FileUpload(accept=".json", multiple=True, description="answers")
    display(upload)
    below = display(HTML(""), display_id=True)

    def update(change) -> None:
        below.update(
            HTML(
                html.escape(
                    _taken_in(
                        run, [(file["name"], bytes(file["content"])) for file in change["new"]]
                    )
                )
            )
        )

    upload.observe(update, names="value")


def _taken_in(run: Run, files: list[tuple[str, bytes]]) -> str:
    try:
        add_answers(run, files)
    except ValueError as error:
        return str(error)
    ratings, opinions = ratings_of(run)
    said = [
        f"{target}: {opinion_sentence(ratings, opinions, target)}"
        for target in ratings["target"].unique()
    ]
    return "Taken in. " + " ".join(said)


def own_song(run: Run, targets: tuple[str, ...]) -> None:
    """An upload field, or a path for files too large for it, and a menu of models: any song is separated and played."""
    upload = ipywidgets.FileUpload(multiple=False, description="song")
    path = ipywidgets.Text(placeholder="or a path on this machine", description="path")
    choices = [
        (f"{LABELS[model]}, {target}", (target, model)) for target in targets for model in MODELS
    ]
    menu = ipywidgets.Dropdown(options=choices, description="model")
    button = ipywidgets.Button(description="Separate", button_style="primary")
    display(ipywidgets.VBox([ipywidgets.HBox([upload, path]), ipywidgets.HBox([menu, button])]))
    out = ipywidgets.Output()
    display(out)

    def work(_button) -> None:
        out.clear_output()
        with out:
            try:
                song = expand_path(path.value) if path.value else _uploaded(run, upload.value)
                display(separated_song(run, song, *menu.value))
            except (ValueError, OSError) as error:
                print(error)

    button.on_click(work)


def _uploaded(run: Run, files: tuple) -> Path:
    """The uploaded file, kept in the run's folder."""
    if not files:
        raise FileNotFoundError("No song yet: upload one, or give its path.")
    song = run.folder / "songs" / safe_name(files[0]["name"])
    with atomic_write(song) as part:
        part.write_bytes(files[0]["content"])
    return song


def separated_song(run: Run, song: Path, target: str, model: str) -> HTML:
    """Separate a song into `songs/` of the run's folder; a player of the stretch in which the target is loudest.

    Raises as `separate_file` does.
    """
    network = trained_model(run, target, model)
    paths = separate_file(song, network, run.folder / "songs" / target / model)
    start, rate = _loudest(paths[0], run.settings.excerpt_s)
    length = round(run.settings.excerpt_s * rate)
    found, rest = (
        soundfile.read(path, length, start, dtype="float32", always_2d=True)[0].T for path in paths
    )
    print(*paths, *filter(None, [bandwidth_note(network, rate)]), sep="\n")
    return players(
        {f"{song.name}, from {start / rate:.0f} s": {"mixture": found + rest, model: found}}, rate
    )


def _loudest(path: Path, length_s: float) -> tuple[int, int]:
    """First sample of the `length_s` seconds with most energy, to a second, and the rate; reads a second at a time."""
    rate = soundfile.info(path).samplerate
    energy = np.array(
        [
            np.sum(block.astype(float) ** 2)
            for block in soundfile.blocks(path, blocksize=rate, always_2d=True)
        ]
    )
    return loudest_start(np.sqrt(energy)[None], max(1, round(length_s))) * rate, rate
