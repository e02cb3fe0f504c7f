import numpy as np
import pytest
import soundfile
from test_blind_test import response_of
from test_excerpts import RATE, make_versions
from test_player import decode_sounds

from mss_utils.config import Run, Settings
from mss_utils.listening import answers_upload, cut_excerpt, track_menu, widgets
from mss_utils.training import train


@pytest.fixture
def shown(monkeypatch):
    """What widgets display and update, in order."""
    items = []
    monkeypatch.setattr(widgets, "display", items.append)
    for name in ("display", "update"):
        monkeypatch.setattr(widgets.DisplayHandle, name, lambda _, item: items.append(item.data))
    return items


def test_menu_shows_the_chosen_track(small_run, store, shown, monkeypatch):
    excerpt = cut_excerpt(make_versions(), "<b>track</b>", "piano", RATE, 1.0)
    monkeypatch.setattr(widgets, "scored_excerpt", lambda *arguments: excerpt)
    track_menu(small_run, store, "piano")
    menu, first = shown
    assert "data:audio/mpeg" in first and "<b>" not in first
    menu.value = menu.options[1]
    assert shown[2:] == [f"Loading {menu.options[1]} …", first]


def test_uploaded_answers_are_imported_or_refused(tmp_path, shown):
    run = Run("r", Settings(), tmp_path / "r")
    answers_upload(run)
    for content in (response_of(run="<b>other</b>"), response_of()):
        file = dict(name="a.json", type="", size=1, content=content, last_modified=None)
        shown[0].notify_change(dict(name="value", type="change", new=(file,)))
    assert "<b>" not in shown[-2] and "open that run" in shown[-2]
    assert shown[-1].startswith("Imported. piano: 1 listener, 0 left out; mean opinion A 60")
    assert widgets._uploaded({"a.json": dict(content=b"x")}) == [("a.json", b"x")]  # ipywidgets 7


def test_own_song_is_separated_and_played(small_run, store, tmp_path):
    train(small_run, store, "piano", "unet")
    song = 0.01 * np.random.default_rng(0).standard_normal((4 * 44100, 2))
    song[2 * 44100 : 3 * 44100] *= 20
    soundfile.write(tmp_path / "my <song>.wav", song, 44100)
    page = widgets.song_player(small_run, tmp_path / "my <song>.wav", "piano", "unet").data
    assert "my <song>" not in page and "from 2 s" in page
    assert decode_sounds(page)[0].shape == (44100, 2)
