"""Every form a dataset can have is read with the right length, rate and content; every broken one is one clear error."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.config import expand_path, resolve_settings
from mss_utils.data import (
    audit_warnings,
    build_store,
    check_target_exists,
    find_tracks,
    level_db,
    open_store,
    sources,
)

MUSDB = expand_path(os.environ["MUSDB_PATH"]) if os.environ.get("MUSDB_PATH") else None
needs_musdb = pytest.mark.skipif(
    not (MUSDB and MUSDB.is_dir()), reason="MUSDB_PATH names no folder with MUSDB18 excerpts"
)
MUSDB_STEMS = ("drums", "bass", "other", "vocals")


def chord(stem: int, seconds: float, rate: int, channels: int) -> np.ndarray:
    """`(samples, channels)` float: three tones under 3 kHz, other ones and another level for every stem and channel."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [
        sum(
            np.sin(2 * np.pi * (110 * (stem + 1) * harmonic + 7 * channel) * time)
            for harmonic in (1, 3, 5)
        )
        for channel in range(channels)
    ]
    return 0.03 * (stem + 1) * np.stack(tones, axis=1)


def write_tracks(
    root: Path,
    stems=STEMS,
    suffix=".wav",
    seconds=2.0,
    rate=44100,
    channels=2,
    mixture=False,
    **options,
) -> Path:
    """One track in each of train, valid and test; stem i is `chord(i)`."""
    for split in ("train", "valid", "test"):
        folder = root / split / f"Somebody - {split} song"
        folder.mkdir(parents=True)
        audio = {stem: chord(index, seconds, rate, channels) for index, stem in enumerate(stems)}
        for name, sound in (audio | ({"mixture": sum(audio.values())} if mixture else {})).items():
            soundfile.write(folder / f"{name}{suffix}", sound, rate, **options)
    return root


def assert_content(store, rate, channels, stems=STEMS, seconds=2.0, slack_s=0.0):
    """Right length, rate, stems and channels, and every stem the chord it should be: energy within 0.1 dB, the same wave."""
    assert (store.sample_rate, store.channels, set(store.stems)) == (rate, channels, set(stems))
    for track in store.tracks:
        assert abs(track.samples - seconds * rate) <= slack_s * rate
        mixture, audio = store.load(track)
        for index, stem in enumerate(stems):
            wanted = chord(index, seconds, rate, 2).T[:channels]
            found = audio[store.stem_index(stem)]
            middle = slice(rate // 4, rate)
            assert abs(level_db(found[:, middle]) - level_db(wanted[:, middle])) < 0.1
            lag = find_lag(found[0, middle], wanted[0, middle])
            assert lag <= slack_s * rate, f"{stem} is {lag} samples late"
        assert (
            level_db(mixture - audio.sum(axis=0)) - level_db(mixture) < -20
        )  # lossy coding leaves that much


def find_lag(found, wanted):
    spectrum = np.fft.rfft(found, 2 * len(found)) * np.conj(np.fft.rfft(wanted, 2 * len(found)))
    lag = int(np.fft.irfft(spectrum).argmax())
    return min(lag, 2 * len(found) - lag)


@pytest.fixture(scope="module")
def stem_files(tmp_path_factory):
    """A dataset of three stem files, as stempeg writes them."""
    import stempeg

    root = tmp_path_factory.mktemp("stem files")
    stems = [chord(index, 2.0, 44100, 2) for index in range(4)]
    path = root / "song.stem.mp4"
    stempeg.write_stems(
        str(path), np.stack([sum(stems), *stems]), sample_rate=44100, writer=stempeg.StreamsWriter()
    )
    for split in ("train", "valid", "test"):
        (root / split).mkdir()
        shutil.copy(path, root / split / f"Somebody - {split} song.stem.mp4")
    return root


# --- every form


@pytest.mark.parametrize(
    "suffix, options, slack_s",
    [
        (".wav", {}, 0),
        (".flac", {}, 0),
        (".ogg", {}, 0),
        (".mp3", {}, 0.06),
        (".WAV", {}, 0),
    ],
)
@pytest.mark.parametrize("mixture", [False, True])
def test_folders_with_own_stem_names(tmp_path, suffix, options, slack_s, mixture):
    stems = ("Cello", "my drums", "zither")
    store = build_store(write_tracks(tmp_path, stems, suffix, mixture=mixture, **options), 44100, 2)
    assert_content(store, 44100, 2, stems, slack_s=slack_s)


@pytest.mark.parametrize("source_rate", [16000, 22050, 44100, 48000])
@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_every_rate_is_brought_to_the_working_rate(tmp_path, source_rate, rate):
    store = build_store(write_tracks(tmp_path, rate=source_rate), rate, 2)
    assert store.tracks[0].source_rates == (source_rate,)
    assert_content(store, rate, 2)


def test_a_mono_folder_becomes_stereo_and_stereo_becomes_mono(tmp_path):
    mono = build_store(write_tracks(tmp_path / "mono", rate=16000, channels=1), 16000, 2)
    _, stems = mono.load(mono.tracks[0])
    np.testing.assert_array_equal(stems[:, 0], stems[:, 1])
    assert abs(level_db(stems[0]) - level_db(chord(0, 2, 16000, 1))) < 0.1
    assert_content(build_store(tmp_path / "mono", 16000, 1), 16000, 1)
    stereo = build_store(write_tracks(tmp_path / "stereo", rate=16000), 16000, 1)
    _, stems = stereo.load(stereo.tracks[0])
    np.testing.assert_allclose(
        stems[2], chord(2, 2, 16000, 2).T.mean(axis=0, keepdims=True), atol=1e-3
    )


def test_a_stem_file_written_with_stempeg_is_read_through_musdb(stem_files, monkeypatch):
    through = spy(monkeypatch, "_read_musdb")
    store = build_store(stem_files, 44100, 2)
    assert len(through) == 3
    assert_content(store, 44100, 2, MUSDB_STEMS, slack_s=0.06)


def spy(monkeypatch, name) -> list:
    """Counts the calls of a function of `sources` without changing it."""
    calls, original = [], getattr(sources, name)
    monkeypatch.setattr(sources, name, lambda source: calls.append(source) or original(source))
    return calls


def test_musdb18_hq_is_read_through_musdb(tmp_path, monkeypatch):
    through = spy(monkeypatch, "_read_musdb")
    store = build_store(write_tracks(tmp_path, MUSDB_STEMS, mixture=True), 44100, 2)
    assert len(through) == 3
    assert_content(store, 44100, 2, MUSDB_STEMS)


def test_wav_folders_that_only_look_like_musdb18_hq_are_read_as_they_are(tmp_path, monkeypatch):
    """musdb would clip the loud float stem and read mono files with two channels."""
    through = spy(monkeypatch, "_read_musdb")
    root = write_tracks(tmp_path, MUSDB_STEMS, mixture=True, channels=1, subtype="FLOAT")
    soundfile.write(
        root / "test" / "Somebody - test song" / "bass.wav",
        np.full(88200, 1.5),
        44100,
        subtype="FLOAT",
    )
    store = build_store(root, 44100, 2)
    assert (
        not through
        and abs(store.load(store.split("test")[0])[1][store.stem_index("bass")].max() - 1.5) < 1e-3
    )


def test_the_validation_split(tmp_path):
    """A valid folder, else mus.yaml, else the names of MUSDB18, else every tenth training track."""
    names = lambda root: [track.name for track in find_tracks(root) if track.split == "valid"]
    root = write_dataset(tmp_path, 12, 0, 1, seconds=0.1)
    assert names(root) == ["train song 7"]  # the tenth in alphabetical order
    (root / "train" / "train song 3").rename(root / "train" / "Actions - One Minute Smile")
    assert names(root) == ["Actions - One Minute Smile"]
    (root / "mus.yaml").write_text("validation_tracks: [train song 1, train song 2]")
    assert names(root) == ["train song 1", "train song 2"]
    shutil.copytree(root / "test", root / "valid")
    assert names(root) == ["test song 0"]


@needs_musdb
def test_the_official_validation_split_is_used():
    tracks = find_tracks(MUSDB)
    assert [
        sum(track.split == split for track in tracks) for split in ("train", "valid", "test")
    ] == [80, 14, 50]


def link(root, *tracks):
    """A small MUSDB18 of some excerpts."""
    for track in tracks:
        (root / track).parent.mkdir(exist_ok=True)
        (root / f"{track}.stem.mp4").symlink_to((MUSDB / f"{track}.stem.mp4").resolve())


@needs_musdb
def test_the_audit_finds_what_is_odd_in_the_real_excerpts(tmp_path):
    """One mixture is not the sum of its stems, and an artist stands on both sides of the split, once with a guest."""
    link(
        tmp_path,
        "train/Triviul - Angelsaint",
        "train/A Classic Education - NightOwl",
        "test/PR - Oh No",
        "test/Triviul feat. The Fiend - Widow",
    )
    assert audit_warnings(build_store(tmp_path, 16000, 1)) == [
        "1 track whose stems do not add up to the mixture: PR - Oh No (off by -10 dB)",
        "1 artist on both sides of the split, in test and in train or valid: Triviul",
    ]


@needs_musdb
def test_real_stem_files_are_what_musdb_says_they_are(tmp_path):
    link(
        tmp_path,
        "train/A Classic Education - NightOwl",
        "train/Actions - One Minute Smile",
        "test/AM Contra - Heart Peripheral",
    )
    store = build_store(tmp_path, 44100, 2)
    import musdb

    track = store.split("test")[0]
    real = musdb.DB(root=str(tmp_path), subsets=["test"])[0]
    mixture, stems = store.load(track)
    assert mixture.shape == real.audio.T.shape
    np.testing.assert_allclose(mixture, real.audio.T, atol=2 / 32767)
    for stem, audio in zip(store.stems, stems):
        assert abs(level_db(audio) - level_db(real.targets[stem].audio)) < 0.1


def test_the_excerpts_are_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path))
    monkeypatch.delenv("MUSDB_PATH", raising=False)

    class Fetching:
        def DB(self, root, download):  # noqa: N802
            write_tracks(Path(root), MUSDB_STEMS, seconds=0.5)
            if not self.whole:
                raise URLError("connection lost")

    fetching = Fetching()
    monkeypatch.setattr(sources, "import_musdb", lambda: fetching)
    settings = resolve_settings("musdb7")
    fetching.whole = False
    with pytest.raises(
        ConnectionError, match="could not fetch.*connection lost.*--data DIR or set MUSDB_PATH"
    ):
        open_store(settings)
    assert not list(tmp_path.iterdir())
    fetching.whole = True
    assert len(open_store(settings).tracks) == 3
    monkeypatch.setattr(sources, "import_musdb", None)  # the second time nothing is fetched
    assert len(open_store(settings).tracks) == 3


# --- stem groups


def grouped(text):
    return resolve_settings("smoke", overrides=[f"groups={text}"]).groups


def test_stem_groups_are_added_up(tmp_path):
    root = write_tracks(tmp_path, ("drums", "fx", "synth"), rate=16000)
    store = build_store(root, 16000, 2, grouped("synth+fx->other"))
    assert store.stems == ("drums", "other")
    _, stems = store.load(store.tracks[0])
    np.testing.assert_allclose(
        stems[1], (chord(1, 2, 16000, 2) + chord(2, 2, 16000, 2)).T, atol=1e-3
    )
    assert build_store(root, 16000, 2).stems == ("drums", "fx", "synth"), "a store of its own"


def test_groups_make_tracks_of_different_stems_comparable(tmp_path):
    root = write_tracks(tmp_path, ("bass", "drums", "synth"), rate=16000)
    (root / "test" / "Somebody - test song" / "bass.wav").unlink()
    with pytest.raises(
        ValueError,
        match="2 have bass, drums, synth, but test/Somebody - test song lacks bass.*groups=synth",
    ):
        build_store(root, 16000, 1)
    assert build_store(root, 16000, 1, grouped("bass+synth->pitched")).stems == ("drums", "pitched")


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "violin+synth->other",
            "Group 'other' adds up 'violin', which no track has; there are: drums, fx, synth",
        ),
        (
            "synth+fx->drums",
            r"name of a stem that it leaves out: add it, as in groups=drums\+synth\+fx->drums",
        ),
        ("synth+fx+drums->whole", "have the stem whole only"),
    ],
)
def test_a_group_that_cannot_be_formed(tmp_path, text, words):
    root = write_tracks(tmp_path, ("drums", "fx", "synth"), seconds=0.1)
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1, grouped(text))


def test_a_target_may_be_a_group(tmp_path):
    check_target_exists(
        resolve_settings("demo", target="band", overrides="groups=bass+drums->band")
    )
    with pytest.raises(ValueError, match="No stem 'bass'.*band"):
        check_target_exists(
            resolve_settings("demo", target="bass", overrides="groups=bass+drums->band")
        )


def test_an_unknown_target_lists_the_stems(store, small_settings):
    with pytest.raises(ValueError, match="No stem 'violin'.*bass, drums, piano, vocals"):
        store.stem_index("violin")
    for settings in (small_settings, resolve_settings("demo")):
        with pytest.raises(ValueError, match="No stem 'violin'.*piano"):
            check_target_exists(settings.model_copy(update=dict(target="violin")))
    check_target_exists(resolve_settings("demo", target="all"))


# --- broken input: an error that says what was found, what was expected and what to do


def first_track(root):
    return root / "train" / "train song 0"


def write_zero_length(root):
    soundfile.write(first_track(root) / "bass.wav", np.zeros(0), 16000)


def write_nan(root):
    soundfile.write(first_track(root) / "bass.wav", np.full(1600, np.nan), 16000, subtype="FLOAT")


def write_wav_as_stem_file(root):
    shutil.copy(first_track(root) / "bass.wav", root / "train" / "wav inside.stem.mp4")


BROKEN = {
    "missing folder": (
        shutil.rmtree,
        FileNotFoundError,
        "No dataset folder .*expected .*/train and",
    ),
    "empty folder": (
        lambda root: shutil.rmtree(root) or root.mkdir(),
        FileNotFoundError,
        r"No train tracks under .*\.stem\.mp4 files or folders",
    ),
    "no test tracks": (
        lambda root: shutil.rmtree(root / "test"),
        FileNotFoundError,
        "No test tracks",
    ),
    "folder too high": (lambda root: _nest(root), FileNotFoundError, "did you mean .*/deeper"),
    "a missing stem": (
        lambda root: (first_track(root) / "bass.wav").unlink(),
        ValueError,
        "3 have bass, drums, piano, vocals, but train/train song 0 lacks bass. Complete or remove",
    ),
    "one stem only": (
        lambda root: [file.unlink() for file in root.rglob("*.wav") if file.stem != "bass"],
        ValueError,
        "have the stem bass only; expected two",
    ),
    "stem file where wav was promised": (
        lambda root: (first_track(root) / "bass.wav").write_bytes(
            b"\0\0\0\x18ftypmp42" + bytes(200)
        ),
        ValueError,
        "Cannot read .*bass.wav",
    ),
    "a stem file among folders": (
        write_wav_as_stem_file,
        ValueError,
        "4 have bass, drums, piano, vocals, but train/wav inside lacks piano and has other too",
    ),
    "zero-length wav": (
        write_zero_length,
        ValueError,
        "train song 0: bass has no samples; expected audio",
    ),
    "empty file": (
        lambda root: (first_track(root) / "bass.wav").write_bytes(b""),
        ValueError,
        "Cannot read .*bass.wav",
    ),
    "NaN samples": (write_nan, ValueError, "train song 0: bass holds NaN or infinite samples"),
    "two files for one stem": (
        lambda root: shutil.copy(first_track(root) / "bass.wav", first_track(root) / "bass.flac"),
        ValueError,
        "two files for stem 'bass'",
    ),
}


def _nest(root):
    inside = root.with_name("deeper")
    root.rename(inside)
    root.mkdir()
    inside.rename(root / "deeper")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_dataset_is_one_clear_error_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, case
):
    damage, error, words = BROKEN[case]
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.1)
    damage(root)
    with pytest.raises(error, match=words) as raised:
        build_store(root, 16000, 1)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.part*")) and not any(
        '"complete":true' in index.read_text() for index in tmp_path.rglob("index.json")
    )


def test_several_broken_tracks_are_named_together_and_the_good_ones_kept(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 1, seconds=0.1)
    good = {path: path.read_bytes() for path in root.rglob("bass.wav")}
    for index in (0, 2):
        (root / "train" / f"train song {index}" / "bass.wav").write_bytes(b"no audio")
    with pytest.raises(
        ValueError, match="2 of 5 tracks cannot be used:\n.*train song 0.*\n.*train song 2"
    ):
        build_store(root, 16000, 1)
    for path, content in good.items():
        if path.read_bytes() != content:
            path.write_bytes(content)
    assert len(build_store(root, 16000, 1).tracks) == 5


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "cut at the end",
            r"Cannot read .*train song.stem.mp4 \(.*(moov|Invalid data).*expected MUSDB18's mixture and four stems",
        ),
        (
            "cut, header first",
            r"train song.stem.mp4.*(ends after \d\.\d s of 2\.0 s|streams differ in length).*was cut off",
        ),
        (
            "wav by the name of a stem file",
            r"1 audio streams\); expected MUSDB18's mixture and four stems",
        ),
        ("one stream", r"1 audio streams\); expected MUSDB18's mixture and four stems"),
        ("text", r"Cannot read .*train song.stem.mp4"),
    ],
)
def test_a_broken_stem_file(stem_files, tmp_path, kind, words):
    root = shutil.copytree(stem_files, tmp_path / "data")
    path = root / "train" / "Somebody - train song.stem.mp4"
    if kind == "cut, header first":
        _ffmpeg(
            "-i", path, "-map", "0", "-c", "copy", "-movflags", "faststart", tmp_path / "fast.mp4"
        )
        path.write_bytes((tmp_path / "fast.mp4").read_bytes())
    if kind == "one stream":
        _ffmpeg("-i", path, "-map", "0:0", "-c", "copy", tmp_path / "one.mp4")
        path.write_bytes((tmp_path / "one.mp4").read_bytes())
    if kind.startswith("cut"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    if kind.startswith("wav"):
        soundfile.write(path, chord(0, 2, 44100, 2), 44100, format="WAV")
    if kind == "text":
        path.write_text("not music")
    with pytest.raises(ValueError, match=words):
        build_store(root, 16000, 1)


def _ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", *map(str, arguments)], check=True)


def test_missing_ffmpeg_is_one_sentence(tmp_path, monkeypatch):
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{name}.stem.mp4").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs ffmpeg and ffprobe.*apt-get install ffmpeg"):
        build_store(tmp_path, 16000, 1)


@contextmanager
def not_root():
    """Nobody may read everything but root: be somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "locked, words",
    [
        ("train", "No permission to look into .*/train"),
        ("train/train song 0/bass.wav", "No permission to read .*bass.wav: make it readable"),
    ],
)
def test_unreadable_files_and_folders(monkeypatch, tmp_path_factory, locked, words):
    base = (
        Path("/tmp") / tmp_path_factory.mktemp("locked").name
    )  # outside pytest's own folder, which others may not enter
    base.mkdir()
    try:
        root = write_dataset(base / "data", 2, 1, 1, seconds=0.1)
        (base / "cache").mkdir()
        (base / "cache").chmod(0o777)
        (root / locked).chmod(0)
        monkeypatch.setenv("MSS_CACHE", str(base / "cache"))
        with not_root(), pytest.raises(PermissionError, match=words):
            build_store(root, 16000, 1)
    finally:
        (root / locked).chmod(0o755)
        shutil.rmtree(base)


# --- odd but usable: read, and the audit warns


def warnings_after(tmp_path, change, segment_s=0.0):
    root = write_dataset(tmp_path / "data", 3, 1, 1, seconds=1.2)
    change(root)
    return build_store(root, 16000, 1), "\n".join(
        audit_warnings(build_store(root, 16000, 1), segment_s)
    )


def test_stems_of_different_lengths_end_in_silence(tmp_path):
    store, found = warnings_after(
        tmp_path,
        lambda root: soundfile.write(first_track(root) / "bass.wav", np.full(8000, 0.1), 16000),
    )
    assert (
        "1 track with files of different lengths, the shorter ones end in silence: train song 0 (by 0.70 s)"
        in found
    )
    _, stems = store.load(store.split("train")[0])
    assert stems.shape[-1] == 19200 and not stems[0, :, 8000:].any() and stems[0, :, :8000].all()


def test_stems_of_different_rates_are_brought_together(tmp_path):
    tone = lambda rate: 0.3 * np.sin(2 * np.pi * 220 * np.arange(round(1.2 * rate)) / rate)
    store, found = warnings_after(
        tmp_path, lambda root: soundfile.write(first_track(root) / "bass.wav", tone(48000), 48000)
    )
    assert (
        "1 track with files of different sample rates, all resampled: train song 0 (16000, 48000 Hz)"
        in found
    )
    _, stems = store.load(store.split("train")[0])
    np.testing.assert_allclose(stems[0, 0, 1000:-1000], tone(16000)[1000:-1000], atol=5e-3)


def test_checkpoint_folders_and_hidden_files_are_nobodys_tracks(tmp_path):
    def litter(root):
        for folder in (root, root / "train", first_track(root)):
            (folder / ".ipynb_checkpoints").mkdir()
            shutil.copy(first_track(root) / "bass.wav", folder / ".ipynb_checkpoints" / "bass.wav")
        (first_track(root) / "._bass.wav").write_bytes(b"what a Mac leaves")
        (root / "train" / "read me.txt").write_text("hello")

    store, found = warnings_after(tmp_path, litter)
    assert len(store.tracks) == 5 and "ignored" not in found


def test_folders_without_audio_are_named(tmp_path):
    def litter(root):
        (root / "train" / "lost").mkdir()
        (root / "test" / "song.mp4").write_bytes(b"a stem file by another name")

    store, found = warnings_after(tmp_path, litter)
    assert (
        len(store.tracks) == 5
        and "2 folders without any audio that can be read, ignored: train/lost, test/song.mp4"
        in found
    )


def test_names_with_unicode_and_quotes(tmp_path):
    names = [
        "Ólafur – \"Ärger\" & 'söhne' #1",
        "日本語 $(echo) ; * ?",
        "Ólafur – 'Ärger' & \"söhne\" #1",
    ]
    root = write_tracks(tmp_path, rate=16000)
    for split, name in zip(("train", "valid", "test"), names):
        (root / split / f"Somebody - {split} song").rename(root / split / name)
    store = build_store(root, 16000, 2)
    assert [track.name for track in store.tracks] == names
    assert_content(store, 16000, 2)
