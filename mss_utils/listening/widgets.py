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
from mss_utils.files import atomic_write, safe_name
from mss_utils.listening.blind_test import import_responses, opinion_sentence, write_ratings
from mss_utils.listening.excerpts import excerpt_players, scored_excerpt
from mss_utils.listening.player import players
from mss_utils.models import load_model
from mss_utils.separation import separate_file


def track_menu(run: Run, store: Store, target: str) -> None:
    """Display a menu of all test tracks and a player of the chosen one, first the first track."""
    names = [track.name for track in store.split("test")]
    menu = ipywidgets.Dropdown(options=names, description="track")
    display(menu)
    output = DisplayHandle()

    def player() -> HTML:
        excerpt = scored_excerpt(run, store, target, menu.value)
        return excerpt_players({f"from {excerpt.start_s:.0f} s": excerpt}, store.sample_rate)

    def update(_change: dict) -> None:
        output.update(HTML(f"Loading {escape(menu.value)} …"))
        output.update(player())

    output.display(player())
    menu.observe(update, names="value")


def answers_upload(run: Run) -> None:
    """Display an upload field for responses to the blind test; below it stands the mean opinion."""
    upload = ipywidgets.FileUpload(accept=".json", multiple=True, description="answers")
    display(upload)
    output = DisplayHandle()
    output.display(HTML(""))

    def update(change: dict) -> None:
        try:
            import_responses(run, _uploaded(change["new"]))
            ratings, opinions = write_ratings(run)
        except ValueError as error:
            output.update(HTML(escape(str(error))))
            return
        text = "Imported."
        for target in ratings["target"].unique():
            text += f" {target}: {opinion_sentence(ratings, opinions, target)}"
        output.update(HTML(escape(text)))

    upload.observe(update, names="value")


def _uploaded(value: dict | tuple) -> list[tuple[str, bytes]]:
    """Return names and contents of an upload: ipywidgets 7 has a dict, ipywidgets 8 a tuple."""
    files = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
    return [(name, bytes(file["content"])) for name, file in files]


def song_upload(run: Run, targets: tuple[str, ...]) -> None:
    """Display an upload field, a path field and a menu of models that separate any song."""
    upload = ipywidgets.FileUpload(multiple=False, description="song")
    path = ipywidgets.Text(placeholder="or a path on this machine", description="path")
    models = [(f"{LABELS[m]}, {target}", (target, m)) for target in targets for m in MODELS]
    menu = ipywidgets.Dropdown(options=models, description="model")
    button = ipywidgets.Button(description="Separate", button_style="primary")
    output = ipywidgets.Output()
    display(ipywidgets.VBox([ipywidgets.HBox([upload, path]), ipywidgets.HBox([menu, button])]))
    display(output)

    def separate_song(_button: ipywidgets.Button) -> None:
        output.clear_output()
        with output:
            try:
                song = expand_path(path.value) if path.value else _store_song(run, upload.value)
                display(song_player(run, song, *menu.value))
            except (ValueError, OSError) as error:
                print(error)

    button.on_click(separate_song)


def _store_song(run: Run, value: dict | tuple) -> Path:
    """Write an uploaded song to `songs/` of the run."""
    if not value:
        raise FileNotFoundError("No song: upload a file or enter its path.")
    [(name, content)] = _uploaded(value)
    song = run.folder / "songs" / safe_name(name)
    with atomic_write(song) as part:
        part.write_bytes(content)
    return song


def song_player(run: Run, song: Path, target: str, model: str) -> HTML:
    """Separate a song into `songs/` of the run; return a player of the target's loudest seconds."""
    network = load_model(run.model_folder(target, model))
    paths = separate_file(song, network, run.folder / "songs" / target / model)
    rate = soundfile.info(paths[0]).samplerate
    seconds = soundfile.blocks(paths[0], blocksize=rate, always_2d=True)  # a song may be an hour
    levels = np.sqrt([np.sum(second.astype(float) ** 2) for second in seconds])
    start_s = loudest_start(levels[None], max(1, round(run.settings.excerpt_s)))
    length = round(run.settings.excerpt_s * rate)
    estimate, residual = (
        soundfile.read(path, length, start_s * rate, dtype="float32", always_2d=True)[0].T
        for path in paths
    )
    print(*paths, sep="\n")
    versions = {"mixture": estimate + residual, model: estimate}
    return players({f"{song.name}, from {start_s} s": versions}, rate)
