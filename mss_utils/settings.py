"""Settings of one run: profiles, validation, and where everything of a run lives.

A *profile* is a named set of values on top of the defaults below. A *run* is a folder `results/<run>/` whose
`settings.json` holds every resolved value; once written it wins over defaults, and an argument that contradicts it is
an error. Taught in notebook 01.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterable, Iterator, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

ROOT = Path(__file__).resolve().parent.parent
LETTERS = {"unet": "A", "demucs_lstm": "B1", "demucs_attention": "B2"}  # what prose calls the models
MODELS = tuple(LETTERS)
WAVEFORM_MODELS = MODELS[1:]
SPLITS = ("train", "valid", "test")


def _listed(value: object) -> object:
    """`8,4,2` or `unet,demucs_lstm` on the command line is a tuple; nothing is an empty one."""
    return tuple(value.split(",") if value else ()) if isinstance(value, str) else value


def _number(value: object) -> object:
    """`22050` on the command line is a number, where only some numbers are allowed."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _groups(value: object) -> object:
    """`synth+fx->other,kick+snare->drums` on the command line: stems added up under a new name."""
    if not isinstance(value, str):
        return value
    groups = {}
    for text in filter(None, value.split(",")):
        members, arrow, group = text.partition("->")
        if not (arrow and group.strip() and all(stem.strip() for stem in members.split("+"))):
            raise ValueError(f"a group is written stem+stem->name, not {text!r}")
        groups[group.strip()] = tuple(stem.strip() for stem in members.split("+"))
    return groups


class Settings(BaseModel):
    """Every value that shapes a run. Times end in `_s`, levels in `_db`, counts start with `n_`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str = "demo"
    data: str | None = Field(None, description="dataset root; empty means the profile's own dataset")
    target: str = Field("piano", description="stem to extract, several with commas between, or 'all'")
    seeds: int = Field(1, ge=1, description="how many weight initialisations of each model are trained")

    # data
    sample_rate: Annotated[Literal[16000, 22050, 44100], BeforeValidator(_number)] = 16000
    channels: Annotated[Literal[1, 2], BeforeValidator(_number)] = 1
    groups: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_groups)] = Field(
        {}, description="stems added up under a new name: synth+fx->other"
    )
    n_train_songs: int = Field(100, ge=1, description="built-in songs only")
    n_valid_songs: int = Field(12, ge=1, description="built-in songs only")
    n_test_songs: int = Field(20, ge=1, description="built-in songs only")
    song_min_s: float = Field(45.0, gt=0, description="built-in songs only")
    song_max_s: float = Field(90.0, gt=0, description="built-in songs only")

    # mixing
    train_share: float = Field(1.0, gt=0, le=1, description="share of the training tracks that are used, the first ones of a fixed shuffle")
    segment_s: float = Field(3.0, gt=0)
    batch_size: int = Field(4, ge=1)
    random_mix: bool = Field(True, description="stems of one example come from different songs")
    coherent_share: float = Field(0.5, ge=0, le=1, description="share of examples that keep one song's stems together")
    gain_db: float = Field(3.0, ge=0, description="each stem is scaled by a random gain in +-gain_db")
    flip_polarity: bool = True
    swap_channels: bool = Field(True, description="stereo only")
    silent_share: float = Field(0.02, ge=0, le=1, description="share of examples whose target is silent; in all others it sounds")
    speed_semitones: int = Field(0, ge=0, le=12, description="stems are played higher and faster, or lower and slower, by up to so many")
    loader_workers: int = Field(2, ge=1, description="threads that read training segments ahead")
    curriculum: bool = Field(True, description="two sources, then three, then all")
    stage2_step: int = Field(50, ge=0, description="from this step on: three sources")
    stage3_step: int = Field(150, ge=0, description="from this step on: all sources")

    # models
    n_fft: int = Field(2048, ge=16)
    hop: int = Field(512, ge=4)
    unet_channels: int = Field(16, ge=1)
    unet_depth: int = Field(5, ge=2)
    unet_tall_channels: int = Field(256, ge=1, description="of the path that sees all bins of a frame at once")
    demucs_channels: int = Field(256, ge=2, description="filters of the first layer; channels double from layer to layer")
    demucs_max_channels: int = Field(256, ge=1, description="up to this many, the width of the bottleneck")
    demucs_strides: Annotated[tuple[int, ...], BeforeValidator(_listed), Field(min_length=1)] = (64, 4, 4)
    attention_heads: int = Field(8, ge=1)

    # training
    start_from: str = Field("", description="run whose trained models of the same name, target and seed these begin as; empty: random weights")
    steps: int = Field(1350, ge=1)
    unet_lr: float = Field(2e-3, gt=0)
    demucs_lr: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(1e-2, ge=0)
    grad_clip: float = Field(5.0, gt=0)
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the running average of the weights, validated beside the raw ones")
    valid_every: int = Field(225, ge=1)
    valid_s: float = Field(20.0, gt=0, description="seconds of each validation track that are scored while training")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, ge=1, description="GPUs of this machine that share every batch")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    # evaluation
    scorer: Literal["bss_eval", "museval"] = Field("bss_eval", description="museval gives the same scores, many times slower")
    referee_tracks: int = Field(2, ge=0, description="so many test tracks, the shortest, are scored by museval too, and compared")
    ablations: Annotated[tuple[Literal[MODELS], ...], BeforeValidator(_listed)] = Field(
        (), description="models that are also trained without random mixing and without curriculum, as many steps"
    )

    # analysis
    data_study: bool = Field(False, description="train B1 and B2 with 10 and 30 % of the training tracks too: which of them needs more?")

    # listening
    excerpt_s: float = Field(10.0, gt=0, description="length of the excerpts one can listen to")

    @property
    def segment(self) -> int:
        """Training segment in samples."""
        return round(self.segment_s * self.sample_rate)


# What each profile changes. `smoke` is for tests, `demo` for two CPU cores, `musdb7` for the 7-second excerpts,
# `musdb18` for the full dataset on a GPU.
PROFILES: dict[str, dict] = {
    "smoke": dict(
        n_train_songs=3, n_valid_songs=1, n_test_songs=3, song_min_s=8.0, song_max_s=12.0, segment_s=2.0, batch_size=2,
        stage2_step=3, stage3_step=6, unet_channels=4, unet_depth=3, unet_tall_channels=16, demucs_channels=16,
        demucs_max_channels=16, attention_heads=2, steps=12, warmup_steps=2, valid_every=6, valid_s=5.0, excerpt_s=3.0,
        ablations=("unet",), referee_tracks=1, data_study=True,
    ),
    "demo": dict(),
    "musdb7": dict(target="vocals", speed_semitones=2, unet_tall_channels=64, steps=4000, ema_decay=0.998, valid_s=7.0, excerpt_s=6.0),
    "musdb18": dict(
        target="vocals", sample_rate=22050, channels=2, segment_s=6.0, batch_size=16, unet_channels=32, unet_tall_channels=512,
        demucs_channels=512, demucs_max_channels=768, steps=60000, stage2_step=2000, stage3_step=6000, warmup_steps=1000, valid_every=2000,
        valid_s=60.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """One run: its name, its settings and its folders under `results/<name>/`."""

    name: str
    settings: Settings
    folder: Path

    def write_settings(self) -> None:
        """Keep the settings with the run; from then on they win over defaults. Called before the first result is written."""
        write_text(self.folder / "settings.json", self.settings.model_dump_json(indent=2) + "\n")

    def variant(self, label: str, **changes: object) -> Run:
        """The same run with other settings and no ablations or data study, in a folder of its own inside this one's."""
        settings = self.settings.model_copy(update=dict(ablations=(), data_study=False) | changes)
        return Run(f"{self.name}/{label}", settings, self.folder / label)

    def model_folder(self, target: str, model: str, seed: int = 0) -> Path:
        return self.folder / "models" / target / model / f"seed{seed}"

    def table(self, name: str) -> Path:
        return self.folder / "tables" / f"{name}.csv"

    def figure(self, name: str) -> Path:
        return self.folder / "figures" / name

    def audio(self, track: str, target: str) -> Path:
        return self.folder / "audio" / safe_name(track) / target


def resolve(profile: str = "demo", data: str = "", target: str = "", overrides: str | Iterable[str] = ()) -> Settings:
    """The profile's settings with what is given on top; empty arguments mean "as the profile has it".

    `overrides` are `key=value` strings, or one string of them with spaces between. Raises ValueError for an unknown
    profile, setting or value, in one sentence.
    """
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; there are: {', '.join(PROFILES)}.")
    return _validated({"profile": profile, **PROFILES[profile], **_given(data, target, overrides)}, f"profile {profile}")


def open_run(profile: str = "demo", run: str = "", data: str = "", target: str = "", overrides: str | Iterable[str] = ()) -> Run:
    """Return the run called `run` (default: the profile's name), with its stored settings if it has been begun.

    Nothing is written yet, see `Run.write_settings`. Raises ValueError as `resolve` does, for an argument that
    contradicts the run's own settings.json, and for the name of a collection.
    """
    settings = resolve(profile, data, target, overrides)
    name = run or profile
    if any(safe_name(part) != part for part in name.split("/")):
        raise ValueError(f"A run name may hold letters, digits, '.', '_' and '-', with '/' before the name of a variant, not {name!r}.")
    folder = results_folder() / name
    if runs := runs_in(name):
        raise ValueError(f"{name!r} is a collection of runs ({', '.join(run.name for run in runs)}): name one of them, or choose another name.")
    if (folder / "settings.json").exists():
        settings = _stored_settings(folder / "settings.json", {"profile": profile, **_given(data, target, overrides)})
    return Run(name, settings, folder)


def runs_in(collection: str) -> list[Run]:
    """The runs of a collection, a folder of `results/` that holds runs and has no settings of its own; none where it is a run, or nothing."""
    folder = results_folder() / collection
    stored = [] if not collection or (folder / "settings.json").exists() else sorted(folder.glob("*/settings.json"))
    return [Run(f"{collection}/{path.parent.name}", _stored_settings(path, {}), path.parent) for path in stored]


def results_folder() -> Path:
    """Where runs live: `results/` of this repository, or MSS_RESULTS (the tests use it)."""
    return from_root(os.environ.get("MSS_RESULTS") or "results")


def cache_folder() -> Path:
    """Where stem stores and built-in songs are kept: `.cache/` of this repository, or MSS_CACHE."""
    return from_root(os.environ.get("MSS_CACHE") or ".cache")


def from_root(path: str | Path) -> Path:
    """A path as the user wrote it: absolute, below the home folder (~), or relative to the repository root, never the cwd."""
    return ROOT / Path(path).expanduser()


def safe_name(name: str) -> str:
    """`name` with everything but letters, digits, '.', '_', '-' and spaces inside replaced, in 120 bytes: fit for a file name."""
    kept = "".join(c if c.isalnum() or c in "._- " else "_" for c in name).strip(" .")
    return kept.encode()[:120].decode(errors="ignore") or "_"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader never sees half of it, see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` if all goes well, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one process works in `folder`; the others wait for it. A killed process lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is working in {folder}; waiting for it.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _given(data: str, target: str, overrides: str | Iterable[str]) -> dict[str, str]:
    named = {key: value for key, value in dict(data=data, target=target).items() if value}
    return dict(_parse_overrides(overrides)) | named


def _parse_overrides(overrides: str | Iterable[str]) -> Iterable[tuple[str, str]]:
    for item in overrides.split() if isinstance(overrides, str) else overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"A setting is given as key=value, not {item!r}.")
        yield key, value


def _validated(values: dict, where: str) -> Settings:
    """Settings from `values`; pydantic's report is folded into one sentence."""
    unknown = [key for key in values if key not in Settings.model_fields]
    if unknown:
        raise ValueError(f"Unknown setting {unknown[0]!r}; there are: {', '.join(Settings.model_fields)}.")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"Setting {first['loc'][0]!r} of {where} is {first['input']!r}: {first['msg']}.") from None


def _stored_settings(path: Path, given: dict) -> Settings:
    settings = _validated(json.loads(path.read_text()), str(path))
    wanted = _validated(settings.model_dump() | given, "this call")
    for key in given:
        old, new = getattr(settings, key), getattr(wanted, key)
        if old != new:
            raise ValueError(
                f"Run {path.parent.name!r} was made with {key}={old!r}, this call asks for {new!r}: "
                f"leave {key} out, choose another run name, or delete {path.parent}."
            )
    return settings
