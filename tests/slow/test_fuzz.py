"""Random damage to files, settings and names: a result or one readable error, no file elsewhere."""

import io
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import STEMS, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mss_utils.config import MODELS, Settings, create_or_load_run, load_run, resolve_settings
from mss_utils.data import build_store, read_store
from mss_utils.models import build_model
from mss_utils.separation import separate_file

EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)  # shown by the command line
TIMEOUT_S = 60
RATE = 16000
FORMATS = ("wav", "flac", "ogg", "mp3", "aiff")

fuzz = settings(
    max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
_opened: list[str] | None = None


def record_writes(event, arguments):
    """Audit hook: remember every path that Python opens to write, creates or renames to."""
    if _opened is None:
        return
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    opens = event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & writing
    if opens or event == "os.mkdir":
        _opened.append(os.fsdecode(arguments[0]))
    elif event in ("os.rename", "os.link", "os.symlink"):
        _opened.append(os.fsdecode(arguments[1]))


sys.addaudithook(record_writes)


@contextmanager
def guarded(*allowed):
    """Fail if something is written outside `allowed`, or after TIMEOUT_S seconds."""
    global _opened
    signal.signal(signal.SIGALRM, lambda *_: pytest.exit(f"no answer in {TIMEOUT_S} s"))
    signal.alarm(TIMEOUT_S)
    _opened = []
    try:
        yield
    finally:
        signal.alarm(0)
        written, _opened = _opened, None
    places = [Path(os.path.realpath(place)) for place in (*allowed, "/dev")]
    paths = [Path(os.path.realpath(path)) for path in written]
    outside = [path for path in paths if not any(path.is_relative_to(place) for place in places)]
    assert not outside, outside


def result_or_error(function, *arguments):
    """Return value of a call, or its error if the command line would show it as a sentence."""
    try:
        return function(*arguments)
    except EXPECTED as error:
        text = str(error)
        assert len(text.split()) > 3 and "Traceback" not in text and len(text) < 2000, text
        return error


damage = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("set"), st.floats(0, 0.01), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 0.2), st.binary(min_size=1, max_size=40)),
    ),
    min_size=1,
    max_size=6,
)


def damaged(content, changes):
    """Bytes with some values changed, cut off or inserted."""
    for kind, position, value in changes:
        at = int(position * max(0, len(content) - 1))
        if kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        else:
            content = content[:at] + bytes([value]) + content[at + 1 :]
    return content


def sound_bytes(kind):
    """A quarter of a second of stereo noise as a file of that format."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).standard_normal((RATE // 4, 2)) * 0.1
    soundfile.write(file, noise, RATE, format=kind.upper())
    return file.getvalue()


class HalfModel(torch.nn.Module):
    """Estimate half of the mixture."""

    target, sample_rate, channels, segment_s = "piano", RATE, 1, 0.1

    def forward(self, mixture):
        return 0.5 * mixture


@pytest.fixture
def small_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path / "results"))
    return write_dataset(tmp_path / "data", 3, 1, 2, seconds=0.2)


def test_damaged_song_is_separated_or_refused(tmp_path):
    contents = {kind: sound_bytes(kind) for kind in FORMATS}

    @fuzz
    @given(st.sampled_from(FORMATS), damage)
    def check(kind, changes):
        song, out = tmp_path / f"song.{kind}", tmp_path / "out"
        song.write_bytes(damaged(contents[kind], changes))
        with guarded(out):
            result = result_or_error(separate_file, song, HalfModel(), out)
        expected = [] if isinstance(result, Exception) else sorted(result)
        assert sorted(out.iterdir() if out.exists() else []) == expected
        shutil.rmtree(out, ignore_errors=True)

    check()


def test_damaged_dataset_is_decoded_or_refused(small_dataset, tmp_path):
    contents = {kind: sound_bytes(kind) for kind in FORMATS if kind != "aiff"}
    track = small_dataset / "train" / "train song 1"

    @fuzz
    @given(st.sampled_from(sorted(contents)), damage, st.sampled_from(STEMS))
    def check(kind, changes, damaged_stem):
        for path in track.iterdir():
            path.unlink()
        for stem in STEMS:
            (track / f"{stem}.wav").write_bytes(contents["wav"])
        (track / f"{damaged_stem}.wav").unlink()
        (track / f"{damaged_stem}.{kind}").write_bytes(damaged(contents[kind], changes))
        with guarded(tmp_path / "cache"):
            result = result_or_error(build_store, small_dataset, RATE, 1)
        assert isinstance(result, Exception) or len(result.tracks) == 6

    check()


def test_damaged_store_index_is_refused_or_rebuilt(small_dataset, tmp_path):
    store = build_store(small_dataset, RATE, 1)
    carried = shutil.copytree(store.folder, tmp_path / "carried")
    index = (store.folder / "index.json").read_bytes()

    @settings(fuzz, max_examples=30)
    @given(damage)
    def check(changes):
        (carried / "index.json").write_bytes(damaged(index, changes))
        (store.folder / "index.json").write_bytes(damaged(index, changes))
        with guarded(tmp_path / "cache"):
            result_or_error(read_store, carried)
            assert len(build_store(small_dataset, RATE, 1).tracks) == 6

    check()


values = st.one_of(
    st.sampled_from(
        ["nan", "inf", "0", "1e400", "9" * 30, "none", "[]", "a->b", "a+b->../c", "\0"]
    ),
    st.integers(-3, 10**9).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
any_setting = st.tuples(
    st.sampled_from(sorted(Settings.model_fields)) | st.text(max_size=10), values
)
likely_setting = st.one_of(
    st.tuples(st.sampled_from(["segment_s", "valid_s", "unet_lr"]), st.floats(0.05, 3).map(str)),
    st.tuples(st.sampled_from(["hop", "attention_heads"]), st.integers(1, 64).map(str)),
    st.tuples(st.just("n_fft"), st.sampled_from(["64", "512", "1000", "4096"])),
    st.tuples(st.just("unet_depth"), st.integers(2, 6).map(str)),
    st.tuples(st.just("demucs_strides"), st.sampled_from(["8,4", "4", "3,3", "16,2,2", ""])),
)


def test_accepted_settings_can_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    built = []

    @fuzz
    @given(st.lists(any_setting | likely_setting, min_size=1, max_size=3))
    def check(overrides):
        text = [f"{key}={value}" for key, value in overrides]
        with guarded(tmp_path):
            run = result_or_error(create_or_load_run, "smoke", "fuzz", "", "", text)
            if isinstance(run, Exception):
                return
            run.write_settings()
            assert create_or_load_run("smoke", "fuzz").settings == run.settings
            shutil.rmtree(tmp_path / "fuzz")
            sizes = run.settings
            width = max(
                sizes.unet_channels * 2**sizes.unet_depth, sizes.demucs_channels, sizes.n_fft
            )
            if width < 10_000:  # larger models do not fit into memory
                mixture = torch.zeros(1, sizes.channels, min(sizes.segment, 44100))
                for name in MODELS:
                    assert build_model(name, sizes)(mixture).shape == mixture.shape
                built.append(sizes)

    check()
    assert len(built) > 5


def test_damaged_settings_file_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    document = json.dumps(resolve_settings("smoke").model_dump(mode="json")).encode()
    (tmp_path / "old").mkdir()

    @fuzz
    @given(damage)
    def check(changes):
        (tmp_path / "old" / "settings.json").write_bytes(damaged(document, changes))
        with guarded():
            result_or_error(load_run, "old")
            result_or_error(create_or_load_run, "smoke", "old")

    check()


NAMES = (
    "evil..",
    "<img src=x onerror=window.harmed=1>",
    "a\nb\tc",
    "x" * 240,
    "日" * 80,
    "'; rm -rf ~ #",
    "=HYPERLINK(1)",
    "~",
    "#let x = 1 *bold* _it_ @ref",
    "-rf",
    " spaces ",
    "\x1b[31mred",
    os.fsdecode(b"caf\xe9 latin-1"),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_track_name_stays_in_its_folder(name, small_dataset, tmp_path):
    track = small_dataset / "test" / "test song 0"
    track.rename(track.with_name(name))
    song = tmp_path / f"{name}.wav"
    song.write_bytes(sound_bytes("wav"))
    with guarded(tmp_path / "cache", tmp_path / "out"):
        assert len(build_store(small_dataset, RATE, 1).split("test")) == 2
        paths = separate_file(song, HalfModel(), tmp_path / "out")
    assert all(path.parent == tmp_path / "out" and path.exists() for path in paths)
