"""Settings of one run: profiles, validation, and where everything of a run lives.

A *profile* is a named set of values on top of the defaults below. A *run* is a folder `results/<run>/` whose
`settings.json` holds every resolved value; once written it wins over defaults, and an argument that contradicts it is
an error. Taught in notebook 01.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterable, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mss_utils.files import is_safe_file_name, safe_name, write_text

ROOT = Path(__file__).resolve().parent.parent
MODEL_LETTERS = {
    "unet": "A",
    "demucs_lstm": "B1",
    "demucs_attention": "B2",
}  # what prose calls the models
MODELS = tuple(MODEL_LETTERS)
WAVEFORM_MODELS = MODELS[1:]
SPLITS = ("train", "valid", "test")
RESERVED = (
    "all",
    "mixture",
    "residual",
)  # no stem can be called what a target, or what is no stem, is called


def is_valid_stem_name(name: object) -> bool:
    """Whether a stem can be called so: stems become folders, targets and words on pages."""
    return is_safe_file_name(name) and name not in RESERVED and not set(name) & set("<>")


def _known_profile(value: str) -> str:
    if value not in PROFILES:
        raise ValueError(f"there are: {', '.join(PROFILES)}")
    return value


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
        if not is_valid_stem_name(group.strip()):
            raise ValueError(
                f"a group becomes a stem and a folder, and cannot be called {_short(group.strip())}"
            )
        groups[group.strip()] = tuple(stem.strip() for stem in members.split("+"))
    return groups


class Settings(BaseModel):
    """Every value that shapes a run. Times end in `_s`, levels in `_db`. The upper limits are far beyond use: they catch slips."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    profile: Annotated[str, AfterValidator(_known_profile)] = "demo"
    data: str | None = Field(
        None, description="dataset root; empty means the profile's own dataset"
    )
    target: str = Field(
        "piano", description="stem to extract, several with commas between, or 'all'"
    )
    seeds: int = Field(
        1, ge=1, le=100, description="how many weight initialisations of each model are trained"
    )

    # data
    sample_rate: Annotated[Literal[16000, 22050, 44100], BeforeValidator(_number)] = 16000
    channels: Annotated[Literal[1, 2], BeforeValidator(_number)] = 1
    groups: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_groups)] = Field(
        {}, description="stems added up under a new name: synth+fx->other"
    )
    n_train_songs: int = Field(100, ge=1, le=100_000, description="built-in songs only")
    n_valid_songs: int = Field(12, ge=1, le=100_000, description="built-in songs only")
    n_test_songs: int = Field(20, ge=1, le=100_000, description="built-in songs only")
    song_min_s: float = Field(45.0, ge=4, le=3600, description="built-in songs only")
    song_max_s: float = Field(90.0, ge=4, le=3600, description="built-in songs only")

    # mixing
    train_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the training tracks that are used, the first ones of a fixed shuffle",
    )
    segment_s: float = Field(3.0, ge=0.1, le=600)
    batch_size: int = Field(4, ge=1, le=65_536)
    random_mix: bool = Field(True, description="stems of one example come from different songs")
    coherent_share: float = Field(
        0.5, ge=0, le=1, description="share of examples that keep one song's stems together"
    )
    gain_db: float = Field(
        3.0, ge=0, le=60, description="each stem is scaled by a random gain in +-gain_db"
    )
    flip_polarity: bool = True
    swap_channels: bool = Field(True, description="stereo only")
    silent_share: float = Field(
        0.02,
        ge=0,
        le=1,
        description="share of examples whose target is silent; in all others it sounds",
    )
    speed_semitones: int = Field(
        0,
        ge=0,
        le=12,
        description="stems are played higher and faster, or lower and slower, by up to so many",
    )
    loader_workers: int = Field(
        2, ge=1, le=64, description="threads that read training segments ahead"
    )
    curriculum: bool = Field(True, description="two sources, then three, then all")
    stage2_step: int = Field(50, ge=0, le=10**9, description="from this step on: three sources")
    stage3_step: int = Field(150, ge=0, le=10**9, description="from this step on: all sources")

    # models
    n_fft: int = Field(2048, ge=16, le=65_536)
    hop: int = Field(512, ge=4)
    unet_channels: int = Field(16, ge=1, le=1024)
    unet_depth: int = Field(5, ge=2, le=10)
    unet_full_band_channels: int = Field(
        256, ge=1, le=16_384, description="of the path that sees all bins of a frame at once"
    )
    demucs_channels: int = Field(
        256,
        ge=2,
        le=16_384,
        description="filters of the first layer; channels double from layer to layer",
    )
    demucs_max_channels: int = Field(
        256, ge=1, le=16_384, description="up to this many, the width of the bottleneck"
    )
    demucs_strides: Annotated[tuple[int, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        64,
        4,
        4,
    )
    attention_heads: int = Field(8, ge=1)

    # training
    start_from: str = Field(
        "",
        description="run whose trained models of the same name, target and seed these begin as; empty: random weights",
    )
    steps: int = Field(1350, ge=1, le=10**9)
    unet_lr: float = Field(2e-3, gt=0, le=10)
    demucs_lr: float = Field(2e-3, gt=0, le=10)
    warmup_steps: int = Field(100, ge=0, le=10**9)
    weight_decay: float = Field(1e-2, ge=0, le=10)
    grad_clip: float = Field(5.0, gt=0)
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="of the running average of the weights, validated beside the raw ones",
    )
    valid_every: int = Field(225, ge=1, le=10**9)
    valid_s: float = Field(
        20.0,
        ge=0.1,
        le=3600,
        description="seconds of each validation track that are scored while training",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(
        1, ge=1, le=1_024, description="GPUs of this machine that share every batch"
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    # evaluation
    scorer: Literal["bss_eval", "museval"] = Field(
        "bss_eval", description="museval gives the same scores, many times slower"
    )
    cross_check_tracks: int = Field(
        2,
        ge=0,
        le=10_000,
        description="so many test tracks, the shortest, are scored by museval too, and compared",
    )
    ablations: Annotated[tuple[Literal[MODELS], ...], BeforeValidator(_listed)] = Field(
        (),
        description="models that are also trained without random mixing and without curriculum, as many steps",
    )

    # analysis
    data_study: bool = Field(
        False,
        description="train B1 and B2 with 10 and 30 % of the training tracks too: which of them needs more?",
    )

    # listening
    excerpt_s: float = Field(
        10.0, ge=0.1, le=600, description="length of the excerpts one can listen to"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        """What no model could be built or trained with is said before anything is rendered or decoded."""
        width = min(
            self.demucs_channels * 2 ** (len(self.demucs_strides) - 1), self.demucs_max_channels
        )
        wrong = {
            "song_min_s is above song_max_s": self.song_min_s > self.song_max_s,
            "hop is above half of n_fft, so windows would leave gaps": self.hop > self.n_fft // 2,
            f"n_fft is no multiple of {2 ** (self.unet_depth + 1)}, which unet_depth={self.unet_depth} halves it by": self.n_fft
            % 2 ** (self.unet_depth + 1),
            "demucs_strides are not all even numbers from 2 to 1024": any(
                n % 2 or not 2 <= n <= 1024 for n in self.demucs_strides
            ),
            f"demucs_channels is no multiple of {2 * self.channels}, sine and cosine for every channel": self.demucs_channels
            % (2 * self.channels),
            "demucs_max_channels is below demucs_channels": self.demucs_max_channels
            < self.demucs_channels,
            f"attention_heads does not divide {width}, the width of the bottleneck": width
            % self.attention_heads,
            f"segment_s={self.segment_s:g} is shorter than one step of the bottleneck": self.segment
            < math.prod(self.demucs_strides),
        }
        if found := [reason for reason, holds in wrong.items() if holds]:
            raise ValueError(found[0])
        return self

    @property
    def segment(self) -> int:
        """Training segment in samples."""
        return round(self.segment_s * self.sample_rate)


RENAMED_SETTINGS = dict(
    referee_tracks="cross_check_tracks", unet_tall_channels="unet_full_band_channels"
)


def upgrade_settings(values: dict) -> dict:
    """Stored settings with the present names of settings that were renamed since."""
    return {RENAMED_SETTINGS.get(name, name): value for name, value in values.items()}


# What each profile changes. `smoke` is for tests, `demo` for two CPU cores, `musdb7` for the 7-second excerpts,
# `musdb18` for the full dataset on a GPU.
PROFILES: dict[str, dict] = {
    "smoke": dict(
        n_train_songs=3,
        n_valid_songs=1,
        n_test_songs=3,
        song_min_s=8.0,
        song_max_s=12.0,
        segment_s=2.0,
        batch_size=2,
        stage2_step=3,
        stage3_step=6,
        unet_channels=4,
        unet_depth=3,
        unet_full_band_channels=16,
        demucs_channels=16,
        demucs_max_channels=16,
        attention_heads=2,
        steps=12,
        warmup_steps=2,
        valid_every=6,
        valid_s=5.0,
        excerpt_s=3.0,
        ablations=("unet",),
        cross_check_tracks=1,
        data_study=True,
    ),
    "demo": dict(),
    "musdb7": dict(
        target="vocals",
        speed_semitones=2,
        unet_full_band_channels=64,
        steps=4000,
        ema_decay=0.998,
        valid_s=7.0,
        excerpt_s=6.0,
    ),
    "musdb18": dict(
        target="vocals",
        sample_rate=22050,
        channels=2,
        segment_s=6.0,
        batch_size=16,
        unet_channels=32,
        unet_full_band_channels=512,
        demucs_channels=512,
        demucs_max_channels=768,
        steps=60000,
        stage2_step=2000,
        stage3_step=6000,
        warmup_steps=1000,
        valid_every=2000,
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


def resolve_settings(
    profile: str = "demo", data: str = "", target: str = "", overrides: str | Iterable[str] = ()
) -> Settings:
    """The profile's settings with what is given on top; empty arguments mean "as the profile has it".

    `overrides` are `key=value` strings, or one string of them with spaces between. Raises ValueError for an unknown
    profile, setting or value, in one sentence.
    """
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; there are: {', '.join(PROFILES)}.")
    return _validated(
        {"profile": profile, **PROFILES[profile], **_given(data, target, overrides)},
        f"profile {profile}",
    )


def create_or_load_run(
    profile: str = "demo",
    run: str = "",
    data: str = "",
    target: str = "",
    overrides: str | Iterable[str] = (),
) -> Run:
    """Return the run called `run` (default: the profile's name), with its stored settings if it has been begun.

    Nothing is written yet, see `Run.write_settings`. Raises ValueError as `resolve` does, for an argument that
    contradicts the run's own settings.json, and for the name of a collection.
    """
    settings = resolve_settings(profile, data, target, overrides)
    name = run or profile
    folder = _folder_of(name)
    if runs := collection_runs(name):
        raise ValueError(
            f"{name!r} is a collection of runs ({', '.join(run.name for run in runs)}): name one of them, or choose another name."
        )
    if (folder / "settings.json").exists():
        settings = _stored_settings(
            folder / "settings.json", {"profile": profile, **_given(data, target, overrides)}
        )
    return Run(name, settings, folder)


def load_run(name: str) -> Run:
    """The run called `name` with the settings it has; FileNotFoundError with the names there are where none is called so."""
    folder = _folder_of(name)
    if not (folder / "settings.json").is_file():
        there = sorted(
            {
                path.relative_to(results_folder()).parts[0]
                for path in [
                    *results_folder().glob("*/settings.json"),
                    *results_folder().glob("*/*/settings.json"),
                ]
            }
        )
        raise FileNotFoundError(
            f"No run {name!r} under {results_folder()}; there are: {', '.join(there) or 'none'}."
        )
    return Run(name, _stored_settings(folder / "settings.json", {}), folder)


def _folder_of(name: str) -> Path:
    if any(safe_name(part) != part for part in name.split("/")):
        raise ValueError(
            f"A run name may hold letters, digits, '.', '_' and '-', with '/' before the name of a variant, not {_short(name)}."
        )
    return results_folder() / name


def collection_runs(collection: str) -> list[Run]:
    """The runs of a collection, a folder of `results/` that holds runs and has no settings of its own; none where it is a run, or nothing.

    Raises ValueError for what cannot be a name.
    """
    folder = _folder_of(collection) if collection else results_folder()
    stored = (
        []
        if not collection or (folder / "settings.json").exists()
        else sorted(folder.glob("*/settings.json"))
    )
    return [
        Run(f"{collection}/{path.parent.name}", _stored_settings(path, {}), path.parent)
        for path in stored
    ]


def results_folder() -> Path:
    """Where runs live: `results/` of this repository, or MSS_RESULTS (the tests use it)."""
    return expand_path(os.environ.get("MSS_RESULTS") or "results")


def cache_folder() -> Path:
    """Where stem stores and built-in songs are kept: `.cache/` of this repository, or MSS_CACHE."""
    return expand_path(os.environ.get("MSS_CACHE") or ".cache")


def expand_path(path: str | Path) -> Path:
    """A path as the user wrote it: absolute, below the home folder (~), or relative to the repository root, never the cwd."""
    return ROOT / Path(path).expanduser()


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
        raise ValueError(
            f"Unknown setting {unknown[0]!r}; there are: {', '.join(Settings.model_fields)}."
        )
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        subject = (
            f"Setting {first['loc'][0]!r} of {where} is {_short(first['input'])}"
            if first["loc"]
            else f"The settings of {where} do not fit together"
        )
        raise ValueError(f"{subject}: {first['msg'].removeprefix('Value error, ')}.") from None


def _short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _stored_settings(path: Path, given: dict) -> Settings:
    settings = _validated(_stored_values(path), str(path))
    wanted = _validated(settings.model_dump() | given, "this call")
    for key in given:
        old, new = getattr(settings, key), getattr(wanted, key)
        if old != new:
            raise ValueError(
                f"Run {path.parent.name!r} was made with {key}={old!r}, this call asks for {new!r}: "
                f"leave {key} out, choose another run name, or delete {path.parent}."
            )
    return settings


def _stored_values(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        values = f"{type(error).__name__}: {error}"
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds no settings ({_short(values)}); expected an object of names and values: mend it, or choose another run name."
        )
    return upgrade_settings(values)
