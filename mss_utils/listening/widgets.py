"""Menus and upload fields of notebook 06; in an exported page only their output remains."""

from html import escape
from pathlib import Path

import ipywidgets
import numpy as np
import soundfile
from IPython.display import HTML, DisplayHandle, display

from mss_utils.config import MODELS, Run, expand_path
from mss_utils.data import Store, loudest_start
from mss_utils.figures import LABELS
from mss_utils.files import safe_name, write_bytes
from mss_utils.listening.blind_test import import_responses, write_ratings
from mss_utils.listening.excerpts import track_excerpt
from mss_utils.listening.player import players
from mss_utils.models import load_model
from mss_utils.separation import separate_file


def track_menu(run: Run, store: Store, target: str) -> None:
    """Display a menu of all test tracks and a player of the chosen one, first the first track."""
    menu = ipywidgets.Dropdown(options=[track.name for track in store.split("test")])
    output = DisplayHandle()

    def player(name: str) -> HTML:
        excerpt = track_excerpt(run, store, target, name)
        heading = f"{name}, from {excerpt.start_s:.0f} s"
        return players({heading: excerpt.versions}, store.sample_rate, {heading: excerpt.scores})

    display(menu)
    output.display(player(menu.value))
    menu.observe(lambda change: output.update(player(change["new"])), names="value")


def answers_upload(run: Run) -> None:
    """Display an upload field for responses to the blind test; below it stand the mean opinions."""
    upload = ipywidgets.FileUpload(accept=".json", multiple=True, description="answers")
    output = DisplayHandle()

    def update(change: dict) -> None:
        try:
            import_responses(run, _uploaded(change["new"]))
            ratings, opinions = write_ratings(run)
            listeners = ratings.groupby("listener")[["kept", "reason"]].first()
            output.update(HTML(listeners.to_html() + opinions.round(1).to_html()))
        except ValueError as error:
            output.update(HTML(escape(str(error))))

    display(upload)
    output.display(HTML(""))
    upload.observe(update, names="value")


def _uploaded(value: dict | tuple) -> list[tuple[str, bytes]]:
    """Return names and contents of an upload: ipywidgets 7 has a dict, ipywidgets 8 a tuple."""
    files = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
    return [(name, bytes(file["content"])) for name, file in files]


def song_upload(run: Run, targets: tuple[str, ...]) -> None:
    """Display an upload field, a path field and a menu of models that separate any song."""
    models = [(f"{LABELS[m]}, {target}", (target, m)) for target in targets for m in MODELS]

    def separate_song(upload: dict | tuple, path: str, model: tuple[str, str]) -> HTML | None:
        try:
            song = expand_path(path) if path else _store_song(run, upload)
            return song_player(run, song, *model)
        except (ValueError, OSError) as error:
            print(error)

    ipywidgets.interact_manual.options(manual_name="Separate")(
        separate_song,
        upload=ipywidgets.FileUpload(multiple=False, description="song"),
        path=ipywidgets.Text(placeholder="or a path on this machine"),
        model=ipywidgets.Dropdown(options=models),
    )


def _store_song(run: Run, value: dict | tuple) -> Path:
    """Write an uploaded song to `songs/` of the run."""
    if not value:
        raise FileNotFoundError("No song: upload a file or enter its path.")
    [(name, content)] = _uploaded(value)
    return write_bytes(run.folder / "songs" / safe_name(name), content)


def song_player(run: Run, song: Path, target: str, model: str) -> HTML:
    """Separate a song into `songs/` of the run; return a player of the target's loudest seconds."""
    network, excerpt_s = load_model(run.model_folder(target, model)), run.settings.excerpt_s
    paths = separate_file(song, network, run.folder / "songs" / target / model)
    rate = soundfile.info(paths[0]).samplerate
    print(*paths, sep="\n")
    seconds = soundfile.blocks(paths[0], rate, always_2d=True)  # a song may be an hour long
    levels = np.array([[np.linalg.norm(second) for second in seconds]])
    start_s = loudest_start(levels, max(1, round(excerpt_s)))
    part = dict(start=start_s * rate, frames=round(excerpt_s * rate), dtype="float32")
    estimate, residual = (soundfile.read(path, **part, always_2d=True)[0].T for path in paths)
    versions = {"mixture": estimate + residual, model: estimate}
    return players({f"{song.name}, from {start_s} s": versions}, rate)
