"""Hostile input: mutated files, wild settings, names made to harm. The answer is a result or one sentence, soon, and no file elsewhere."""

import io
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import SMALL, STEMS, write_dataset
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

from mss_utils.__main__ import main
from mss_utils.config import MODELS, Settings, create_or_load_run, load_run, resolve_settings
from mss_utils.data import build_store, read_store
from mss_utils.models import build_model, load_model
from mss_utils.separation.song_files import separate_file
from mss_utils.training.checkpoints import is_trained
from mss_utils.training.loop import train, training_identity

ANSWERS = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
)  # what the command line turns into a sentence
SLOW_S = 60  # no case takes a second; this is a hang
CASES = dict(
    songs=(50, 500),
    datasets=(50, 500),
    indices=(15, 150),
    settings=(40, 400),
    stored=(15, 150),
    models=(20, 200),
    names=(10, 100),
)
RATE = 16000


@pytest.fixture
def cases(request, count):
    """Run a property on as many cases as its kind has in this form, and count them."""

    def run(kind, strategy, property_):
        long = request.config.getoption("--long")
        seen = []

        @rules(
            max_examples=CASES[kind][long],
            deadline=None,
            database=None,
            derandomize=not long,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def tried(case):
            seen.append(1)
            property_(case)

        tried()
        count("fuzz cases", len(seen))

    return run


# --- the watch: what is written, how long it takes, what is said --------------------------------------------------------

_written: list[str] | None = None


def _note(event, arguments):
    """Every file that Python opens to write, every folder it makes, every name it gives."""
    if _written is None:
        return
    if (
        event == "open"
        and isinstance(arguments[0], (str, bytes))
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        _written.append(os.fsdecode(arguments[0]))
    elif event == "os.mkdir":
        _written.append(os.fsdecode(arguments[0]))
    elif event in ("os.rename", "os.link", "os.symlink"):
        _written.append(os.fsdecode(arguments[1]))


sys.addaudithook(_note)


class Hang(BaseException):
    """Nobody catches it by accident."""


@contextmanager
def watched(*allowed):
    """Nothing that Python opens or makes is outside `allowed`, and nobody waits for long."""
    global _written

    def hang(*_):
        raise Hang(f"no answer in {SLOW_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SLOW_S)
    _written = []
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        written, _written = _written, None
    places = [Path(os.path.realpath(place)) for place in (*allowed, "/dev")]
    outside = [
        path
        for path in written
        if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in places)
    ]
    assert not outside, outside


def answer(function, *arguments):
    """What a call returns, or its error, which has to be one that the command line tells, and to say something."""
    try:
        return function(*arguments)
    except ANSWERS as error:
        text = str(error)
        assert len(text.split()) > 3 and "Traceback" not in text and len(text) < 2000, text
        return error


# --- bytes that were changed --------------------------------------------------------------------------------------------

CHANGES = some.lists(
    some.one_of(
        some.tuples(some.just("flip"), some.floats(0, 1), some.integers(0, 255)),
        some.tuples(some.just("cut"), some.floats(0, 1), some.just(0)),
        some.tuples(some.just("put"), some.floats(0, 0.2), some.binary(min_size=1, max_size=40)),
        some.tuples(some.just("head"), some.floats(0, 64), some.integers(0, 255)),
    ),
    min_size=1,
    max_size=6,
)


def changed(content: bytes, changes) -> bytes:
    """Bytes turned, cut off, put in; `head` turns one of the first, where headers are."""
    for kind, where, what in changes:
        at = (
            min(len(content) - 1, int(where) if kind == "head" else int(where * len(content)))
            if content
            else 0
        )
        if kind == "cut":
            content = content[:at]
        elif kind == "put":
            content = content[:at] + what + content[at:]
        elif content:
            content = content[:at] + bytes([what]) + content[at + 1 :]
    return content


def song_bytes(kind: str) -> bytes:
    sound = np.random.default_rng(0).standard_normal((RATE // 4, 2)) * 0.1
    file = io.BytesIO()
    if kind == "wav, float":
        soundfile.write(file, sound, RATE, format="WAV", subtype="FLOAT")
    else:
        soundfile.write(file, sound, RATE, format=kind.upper())
    return file.getvalue()


KINDS = ("wav", "wav, float", "flac", "ogg", "mp3", "aiff")


class Half(torch.nn.Module):
    """A model of one line: half of what it hears."""

    target, sample_rate, channels, segment_s = "piano", RATE, 1, 0.1

    def forward(self, mixture):
        return 0.5 * mixture


def test_a_song_of_any_bytes_is_separated_or_refused(cases, tmp_path):
    contents = {kind: song_bytes(kind) for kind in KINDS}

    def separated(case):
        kind, changes = case
        song = tmp_path / f"song.{kind[:4].strip(',')}"
        song.write_bytes(changed(contents[kind], changes))
        out = tmp_path / "out"
        with watched(out):
            found = answer(separate_file, song, Half(), out)
        left = {path.name for path in out.iterdir()} if out.exists() else set()
        assert left == (set() if isinstance(found, Exception) else {path.name for path in found}), (
            "nothing half written stays"
        )
        shutil.rmtree(out, ignore_errors=True)

    cases("songs", some.tuples(some.sampled_from(KINDS), CHANGES), separated)


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Six tracks of two tenths of a second, in a folder of their own."""
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path / "results"))
    return write_dataset(tmp_path / "data", 3, 1, 2, seconds=0.2)


def test_a_dataset_with_files_of_any_bytes_is_decoded_or_refused(cases, little, tmp_path):
    contents = {kind: song_bytes(kind) for kind in KINDS}
    track = little / "train" / "train song 1"

    def decoded(case):
        kind, changes, stem = case
        for old in track.iterdir():
            old.unlink()
        for name in STEMS:
            suffix = kind[:4].strip(",").replace("aiff", "wav") if name == stem else "wav"
            (track / f"{name}.{suffix}").write_bytes(
                changed(contents[kind], changes) if name == stem else contents["wav"]
            )
        with watched(tmp_path / "cache"):
            found = answer(build_store, little, RATE, 1)
        assert isinstance(found, Exception) or len(found.tracks) == 6
        assert not list((tmp_path / "cache").rglob(".part-*"))

    cases(
        "datasets",
        some.tuples(some.sampled_from(KINDS), CHANGES, some.sampled_from(STEMS)),
        decoded,
    )


# --- what is JSON, and not what it should be ----------------------------------------------------------------------------

NASTY = (
    "../../evil",
    "/tmp/evil",
    "",
    "..",
    "a" * 300,
    "<script>harm()</script>",
    "x\ny",
    "\0",
    "=1+1",
    "piano,drums",
    "all",
    None,
    True,
    -1,
    1e308,
)
JUNK = some.one_of(
    some.sampled_from(NASTY),
    some.integers(-(10**20), 10**20),
    some.floats(),
    some.text(max_size=20),
    some.just([]),
    some.just({}),
    some.just([[]]),
)


def replaced(document, where: float, junk):
    """A copy of a JSON document with the value at one place, of all its places, replaced."""
    document = json.loads(json.dumps(document))
    places = []

    def walk(node, into):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value, into)

    walk(document, places)
    node, key = places[min(len(places) - 1, int(where * len(places)))]
    node[key] = junk
    return document


DAMAGE = some.one_of(
    some.tuples(some.just("value"), some.floats(0, 1), JUNK),
    some.tuples(some.just("bytes"), CHANGES, some.none()),
)


def damaged(document, damage) -> bytes:
    kind, where, junk = damage
    return (
        changed(json.dumps(document).encode(), where)
        if kind == "bytes"
        else json.dumps(replaced(document, where, junk)).encode()
    )


def test_an_index_of_any_kind_is_read_or_refused_and_one_in_the_cache_made_anew(
    cases, little, tmp_path
):
    store = build_store(little, RATE, 1)
    carried, own = shutil.copytree(store.folder, tmp_path / "carried"), store.folder / "index.json"
    document = json.loads(own.read_text())

    def read(damage):
        (carried / "index.json").write_bytes(damaged(document, damage))
        with watched():
            found = answer(read_store, carried)
            if not isinstance(found, Exception):
                names = [*found.stems, *(track.file for track in found.tracks)]
                assert all(Path(name).name == name for name in names)
                for track in found.tracks:
                    found.load(track)
        own.write_bytes(damaged(document, damage))
        with watched(tmp_path / "cache"):
            assert len(build_store(little, RATE, 1).tracks) == 6

    cases("indices", DAMAGE, read)


VALUES = some.one_of(
    some.sampled_from(
        (
            "nan",
            "inf",
            "-1",
            "0",
            "1e400",
            "1e-9",
            "9" * 30,
            "none",
            "true",
            "[]",
            "{}",
            "a->b",
            "a+b->../c",
            "../..",
            "4,3",
            "1,2,,",
            "\0",
            "ü",
            "7",
        )
    ),
    some.integers(-3, 10**9).map(str),
    some.floats().map(str),
    some.text(max_size=12),
)
WILD = some.tuples(
    some.one_of(some.sampled_from(sorted(Settings.model_fields)), some.text(max_size=10)), VALUES
)
LIKELY = some.one_of(
    some.tuples(
        some.sampled_from(("segment_s", "excerpt_s", "valid_s", "unet_lr", "gain_db")),
        some.floats(0.05, 3).map(str),
    ),
    some.tuples(
        some.sampled_from(("hop", "batch_size", "attention_heads", "steps", "demucs_channels")),
        some.integers(1, 64).map(str),
    ),
    some.tuples(some.just("n_fft"), some.sampled_from(("64", "512", "1000", "4096"))),
    some.tuples(some.just("unet_depth"), some.integers(2, 6).map(str)),
    some.tuples(
        some.just("demucs_strides"),
        some.lists(some.integers(1, 16), max_size=4).map(
            lambda strides: ",".join(map(str, strides))
        ),
    ),
    some.tuples(some.just("channels"), some.sampled_from("123")),
)


def test_any_setting_is_taken_or_refused_and_what_is_taken_can_be_built(
    cases, tmp_path, monkeypatch
):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    built = []

    def taken(case):
        text = [f"{key}={value}" for key, value in case]
        with watched(tmp_path):
            run = answer(create_or_load_run, "smoke", "wild", "", "", text)
            if isinstance(run, Exception):
                return
            run.write_settings()
            assert create_or_load_run("smoke", "wild").settings == run.settings, (
                "what is stored is what is read"
            )
            if (
                max(
                    run.settings.unet_channels * 2**run.settings.unet_depth,
                    run.settings.demucs_channels,
                    run.settings.n_fft,
                )
                < 10_000
            ):
                mixture = torch.zeros(
                    1, run.settings.channels, min(run.settings.segment, 44100)
                )  # larger models would fill the memory
                for name in MODELS:
                    assert build_model(name, run.settings)(mixture).shape == mixture.shape
                built.append(run.settings)
            shutil.rmtree(tmp_path / "wild")

    cases("settings", some.lists(some.one_of(WILD, LIKELY, LIKELY), min_size=1, max_size=3), taken)
    assert len(built) > 5, "some are taken"


def test_the_settings_of_a_run_in_any_state_are_read_or_refused(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    document = resolve_settings("smoke").model_dump(mode="json")
    (tmp_path / "old").mkdir()

    def read(damage):
        (tmp_path / "old" / "settings.json").write_bytes(damaged(document, damage))
        with watched():
            answer(load_run, "old")
            answer(create_or_load_run, "smoke", "old")

    cases("stored", DAMAGE, read)


# --- models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small_settings, store, tmp_path_factory):
    """A trained model's folder, of which each case has a copy: files, and what it was trained with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(tmp_path_factory.mktemp("trained")))
        run = create_or_load_run("smoke", "small", small_settings.data, "piano", SMALL)
        train(run, store, "piano", "unet")
        folder = run.model_folder("piano", "unet")
        yield run, {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.filterwarnings("ignore:.*last.ckpt")
def test_a_model_folder_in_any_state_is_loaded_or_refused_and_trained_again(cases, trained, store):
    run, contents = trained
    folder, trainings = run.model_folder("piano", "unet"), []

    def loaded(case):
        name, damage = case
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        content = (
            damaged(json.loads(contents[name]), damage)
            if name == "model.json"
            else changed(contents[name], damage[1] if damage[0] == "bytes" else [("cut", 0.5, 0)])
        )
        (folder / name).write_bytes(content)
        with watched(run.folder, "/proc/self/clear_refs"):
            model = answer(load_model, folder)
            assert isinstance(model, Exception) or "/" not in model.target
            if name == "last.ckpt":
                (folder / "model.json").unlink()
            if not is_trained(folder, training_identity(run.settings, store, "piano", "unet", 0)):
                trainings.append(name)
                train(run, store, "piano", "unet")  # goes on, or begins anew
                assert pd.read_csv(folder / "history.csv")["step"].tolist() == [3, 6]
                assert all(
                    tensor.isfinite().all()
                    for tensor in load_file(folder / "model.safetensors").values()
                )

    cases("models", some.tuples(some.sampled_from(sorted(contents)), DAMAGE), loaded)
    assert {"last.ckpt", "model.json"} <= set(trainings)


@pytest.mark.filterwarnings("ignore:.*last.ckpt")
@pytest.mark.parametrize(
    "tensors, about",
    [
        ({}, None),
        ({}, {}),
        ({"raw/x": torch.zeros(1)}, "mine"),
        (None, dict(state="{}")),
        (None, dict(state="[1]")),
        (None, dict(state="x")),
    ],
)
def test_a_checkpoint_that_lies_is_begun_anew(trained, store, tensors, about, count):
    run, contents = trained
    folder = run.model_folder("piano", "unet")
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    from safetensors import safe_open

    with safe_open(folder / "last.ckpt", "pt") as file:
        own = file.metadata()
    save_file(
        load_file(folder / "last.ckpt") if tensors is None else tensors,
        folder / "last.ckpt",
        own if about == "mine" else about and own | about,
    )
    (folder / "model.json").unlink()
    train(run, store, "piano", "unet")
    assert pd.read_csv(folder / "history.csv")["step"].tolist() == [3, 6]
    count("damaged checkpoints")


def test_weights_that_are_a_pickle_are_refused_and_never_run(trained, tmp_path, capsys, count):
    """Loading a pickle can run anything; here it would make a file."""
    run, contents = trained
    (tmp_path / "model.json").write_bytes(contents["model.json"])

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    torch.save({"weights": Harm()}, tmp_path / "model.safetensors")
    soundfile.write(tmp_path / "song.wav", np.zeros(RATE), RATE)
    assert (
        main(
            [
                "separate",
                str(tmp_path / "song.wav"),
                "--model",
                str(tmp_path),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert "is no safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "out").exists()
    count("pickles refused")


# --- names --------------------------------------------------------------------------------------------------------------

WILD_NAMES = (
    "evil..",
    "<img src=x onerror=window.harmed=1>",
    "a\nb\tc",
    "x" * 255,
    "日" * 85,
    "'; rm -rf ~ #",
    "{brace} %s $HOME",
    "=HYPERLINK(1)",
    "~",
    "con",
    "#let x = 1 *bold* _it_ @ref",
    "-rf",
    " lead and trail ",
    "a&amp;b",
    "\x1b[31mred",
    "name.wav",
    os.fsdecode(b"caf\xe9 latin-1"),
)
NAMES = some.one_of(
    some.sampled_from(WILD_NAMES),
    some.binary(min_size=1, max_size=60).map(
        lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_").lstrip(b".") or b"_")
    ),
)


def test_a_track_of_any_name_goes_from_the_dataset_to_its_tables_and_files(
    cases, little, small_settings, tmp_path, monkeypatch
):
    from mss_utils.listening.excerpts import cut_excerpt, write_excerpt

    here = little / "test" / "test song 0"

    def gone_through(name):
        nonlocal here
        here = here.rename(here.with_name(name))
        with watched(tmp_path / "cache", tmp_path / "results"):
            store = build_store(little, RATE, 1)
            track = next(track for track in store.split("test") if track.name != "test song 1")
            pd.DataFrame([dict(track=track.name)]).to_csv(
                tmp_path / "results" / "tracks.csv", index=False
            )
            mixture, stems = store.load(track)
            excerpt = cut_excerpt(
                dict(mixture=mixture, reference=stems[0]), track.name, "piano", RATE, 0.1
            )
            write_excerpt(create_or_load_run("smoke", "names"), excerpt, RATE)
        assert (
            pd.read_csv(tmp_path / "results" / "tracks.csv", keep_default_na=False)["track"][
                0
            ].strip()
            == track.name.replace("\r", "\n").strip()
            or "\r" in track.name
        )
        assert {path.parents[2].name for path in tmp_path.rglob("*.mp3")} == {"audio"}
        shutil.rmtree(tmp_path / "results")

    (tmp_path / "results").mkdir()

    def each(name):
        (tmp_path / "results").mkdir(exist_ok=True)
        gone_through(name)

    cases("names", NAMES, each)


@pytest.mark.parametrize("name", [name for name in WILD_NAMES if len(os.fsencode(name)) < 250])
def test_a_song_of_any_name_is_separated(name, tmp_path, count):
    song = tmp_path / f"{name}.wav"
    soundfile.write(io.BytesIO(), np.zeros(1), RATE, format="WAV")
    song.write_bytes(song_bytes("wav"))
    with watched(tmp_path / "out"):
        paths = separate_file(song, Half(), tmp_path / "out")
    assert all(path.parent == tmp_path / "out" and path.exists() for path in paths)
    count("wild names")


# --- things that are no files -------------------------------------------------------------------------------------------


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _loop(path):
    path.unlink()
    path.symlink_to(path)


def _folder(path):
    path.unlink()
    path.mkdir()


def _dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("strange", [_fifo, _loop, _folder, _dangling])
def test_what_is_no_file_is_never_waited_for(strange, little, tmp_path, count):
    strange(little / "train" / "train song 0" / "piano.wav")
    with watched(tmp_path / "cache"):
        assert "train/train song 0 lacks piano" in str(answer(build_store, little, RATE, 1))
    os.mkfifo(little / "mus.yaml")
    shutil.rmtree(little / "valid")
    with watched(tmp_path / "cache"):
        answer(build_store, little, RATE, 1)
    count("strange files")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "a: 1",
        "validation_tracks:",
        "validation_tracks: abc",
        "!!python/object/apply:os.system ['touch harmed']",
        "[" * 3000,
        "\0",
    ],
)
def test_a_mus_yaml_that_names_nothing_is_refused(text, little, tmp_path, count):
    shutil.rmtree(little / "valid")
    (little / "mus.yaml").write_text(text)
    with watched(tmp_path / "cache"):
        assert "names no validation_tracks" in str(answer(build_store, little, RATE, 1))
    count("strange files")


@pytest.mark.parametrize("name", ["all", "residual", "<b>", "x" * 220])
def test_a_stem_that_cannot_be_called_so_is_refused(name, little, tmp_path, count):
    for file in little.glob("*/*/piano.wav"):
        file.rename(file.with_stem(name))
    with watched(tmp_path / "cache"):
        assert "Rename its files" in str(answer(build_store, little, RATE, 1))
    count("wild names")


@pytest.mark.parametrize("rate", [1, 7, 999, 768_001, 2**31 - 1])
def test_absurd_rates_are_refused_and_odd_ones_read(rate, little, tmp_path, count):
    soundfile.write(little / "train" / "train song 0" / "piano.wav", np.zeros(2000), rate)
    with watched(tmp_path / "cache", tmp_path / "out"):
        assert f"piano has {rate} samples a second; expected 1000 to 768000" in str(
            answer(build_store, little, RATE, 1)
        )
        assert f"has {rate} samples a second" in str(
            answer(
                separate_file,
                little / "train" / "train song 0" / "piano.wav",
                Half(),
                tmp_path / "out",
            )
        )
    count("strange files")


@pytest.mark.parametrize("rate", [1000, 22_254, 44_101, 767_999])
def test_odd_rates_are_read_in_little_memory_and_time(rate, little, tmp_path, count):
    file = little / "train" / "train song 0" / "piano.wav"
    soundfile.write(file, np.random.default_rng(0).standard_normal(rate // 5) * 0.1, rate)
    with watched(tmp_path / "cache", tmp_path / "out"):
        track = next(
            track
            for track in build_store(little, RATE, 1).split("train")
            if track.name == "train song 0"
        )
        assert abs(track.samples - 0.2 * RATE) <= 1
        target, residual = separate_file(file, Half(), tmp_path / "out")
    found = soundfile.read(target)[0] + soundfile.read(residual)[0]
    np.testing.assert_allclose(found, soundfile.read(file)[0], atol=1e-6)
    count("strange files")


def test_a_playlist_is_no_song(little, tmp_path, count):
    for head in ("ffconcat version 1.0\nfile other.wav\n", "#EXTM3U\nother.wav\n"):
        (tmp_path / "list.txt").write_text(head)
        with watched(tmp_path / "out"):
            assert "is a list of files, not a song" in str(
                answer(separate_file, tmp_path / "list.txt", Half(), tmp_path / "out")
            )
    count("strange files")


def test_weights_of_nan_are_noticed(little, tmp_path, count):
    class Lost(Half):
        def forward(self, mixture):
            return mixture * torch.nan

    song = little / "train" / "train song 0" / "piano.wav"
    with watched(tmp_path / "out"):
        assert "is not finite" in str(answer(separate_file, song, Lost(), tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
    count("strange files")


def test_a_group_a_run_and_a_collection_stay_in_their_folders(little, tmp_path, capsys, count):
    for arguments in (
        [
            "train",
            "--profile",
            "smoke",
            "--data",
            str(little),
            "--target",
            "../out",
            "--set",
            "groups=bass+drums->../out",
        ],
        ["report", "--run", "../elsewhere"],
        ["report", "--run", "."],
        ["export", "--run", str(tmp_path), "--to", "x"],
        ["run", "--profile", "smoke", "--run", "a/../../b"],
        ["export", "--run", "full", "--to", "../x"],
    ):
        with watched(tmp_path / "cache"):
            assert main(arguments) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        count("ways out closed")
