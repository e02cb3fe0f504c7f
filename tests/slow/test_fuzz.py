"""Random damage to files and settings: a result or one readable error."""

import io
import json
import shutil

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
RATE = 16000

fuzz = settings(deadline=60_000, database=None, suppress_health_check=list(HealthCheck))
damage = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut"]),
        st.floats(0, 1) | st.floats(0, 0.01),  # often in the header
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=6,
)


def damaged(content, changes):
    """Bytes with some values changed, cut off or inserted."""
    for kind, position, value in changes:
        at = int(position * len(content))
        rest = content[at:] if kind == "insert" else content[at + len(value) :]
        content = content[:at] + (b"" if kind == "cut" else value + rest)
    return content


def sound_bytes(kind):
    """A fifth of a second of noise as a file of that format."""
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 5)
    soundfile.write(file, noise, RATE, format=kind.upper())
    return file.getvalue()


SOUNDS = {kind: sound_bytes(kind) for kind in ("wav", "flac", "ogg", "mp3")}


def result_or_error(function, *arguments):
    """Return value of a call, or its error if the command line would show it as a sentence."""
    try:
        return function(*arguments)
    except EXPECTED as error:
        text = str(error)
        assert len(text.split()) > 3 and "Traceback" not in text and len(text) < 2000, text
        return error


class HalfModel(torch.nn.Module):
    """Estimate half of the mixture."""

    target, sample_rate, channels, segment_s = "piano", RATE, 1, 0.1

    def forward(self, mixture):
        return 0.5 * mixture


@pytest.fixture
def small_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    return write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.2)


@fuzz
@given(kind=st.sampled_from(sorted(SOUNDS)), changes=damage)
def test_damaged_song_is_separated_or_refused(tmp_path, kind, changes):
    song, out = tmp_path / f"song.{kind}", tmp_path / "out"
    song.write_bytes(damaged(SOUNDS[kind], changes))
    result = result_or_error(separate_file, song, HalfModel(), out)
    expected = [] if isinstance(result, Exception) else sorted(result)
    assert sorted(out.iterdir() if out.exists() else []) == expected
    shutil.rmtree(out, ignore_errors=True)


@fuzz
@given(stem=st.sampled_from(STEMS), kind=st.sampled_from(sorted(SOUNDS)), changes=damage)
def test_damaged_dataset_is_decoded_or_refused(small_dataset, stem, kind, changes):
    track = small_dataset / "train" / "train song 1"
    shutil.rmtree(track)
    shutil.copytree(small_dataset / "train" / "train song 0", track)
    (track / f"{stem}.wav").unlink()
    (track / f"{stem}.{kind}").write_bytes(damaged(SOUNDS[kind], changes))
    result = result_or_error(build_store, small_dataset, RATE, 1)
    assert isinstance(result, Exception) or len(result.tracks) == 4


@fuzz
@given(changes=damage)
def test_damaged_store_index_is_refused_or_rebuilt(small_dataset, changes):
    store = build_store(small_dataset, RATE, 1)
    index = store.folder / "index.json"
    index.write_bytes(damaged(index.read_bytes(), changes))
    result_or_error(read_store, store.folder)
    assert len(build_store(small_dataset, RATE, 1).tracks) == 4


@fuzz
@given(changes=damage)
def test_damaged_settings_file_is_read_or_refused(tmp_path, changes):
    document = json.dumps(resolve_settings("smoke").model_dump(mode="json")).encode()
    (tmp_path / "old").mkdir(exist_ok=True)
    (tmp_path / "old" / "settings.json").write_bytes(damaged(document, changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(tmp_path))
        result_or_error(load_run, "old")
        result_or_error(create_or_load_run, "smoke", "old")


names = st.sampled_from(sorted(Settings.model_fields)) | st.text(max_size=10)
hostile = st.sampled_from(["nan", "1e400", "9" * 30, "none", "[]", "a->b", "a+b->../c", "\0"])
values = hostile | st.integers(-3, 10**9) | st.floats() | st.text(max_size=12)
sizes = ["segment_s", "hop", "n_fft", "demucs_heads", "unet_depth", "demucs_filter_ms"]
likely = st.integers(1, 8) | st.sampled_from([64, 512, 4096])
overrides = st.lists(
    st.tuples(names, values) | st.tuples(st.sampled_from(sizes), likely), min_size=1, max_size=3
)


def test_accepted_settings_can_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    built = []

    @fuzz
    @given(overrides)
    def check(pairs):
        text = [f"{name}={value}" for name, value in pairs]
        run = result_or_error(create_or_load_run, "smoke", "fuzz", "", "", text)
        if isinstance(run, Exception):
            return
        run.write_settings()
        assert create_or_load_run("smoke", "fuzz").settings == run.settings
        shutil.rmtree(tmp_path / "fuzz")
        chosen = run.settings
        sizes = (chosen.unet_channels * 2**chosen.unet_depth, chosen.demucs_width, chosen.n_fft)
        width = max(*sizes, chosen.demucs_bottleneck_width, chosen.channels * chosen.demucs_taps)
        if width < 10_000:  # larger models do not fit into memory
            mixture = torch.zeros(1, chosen.channels, min(chosen.segment, 44100))
            for name in MODELS:
                assert build_model(name, chosen)(mixture).shape == mixture.shape
            built.append(chosen)

    check()
    assert len(built) > 5
