"""Settings of one run: profiles, validation, and the folders of a run.

A *profile* is a set of values on top of the defaults. A *run* is a folder `results/<run>/`, whose
`settings.json` holds every value and takes precedence over the defaults. Taught in notebook 01.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mss_utils.files import is_safe_file_name, safe_name, write_text

ROOT = Path(__file__).resolve().parent.parent
MODEL_LETTERS = {
    "unet": "A",
    "demucs_framewise": "B0",
    "demucs_lstm": "B1",
    "demucs_attention": "B2",
}
MODELS = tuple(MODEL_LETTERS)
ModelName = Literal["unet", "demucs_framewise", "demucs_lstm", "demucs_attention"]
WAVEFORM_MODELS = MODELS[1:]
SEQUENCE_MODELS = WAVEFORM_MODELS[1:]  # their bottlenecks connect frames
COMPARED_MODELS = (MODELS[0], *SEQUENCE_MODELS)  # without the control B0
SPLITS = ("train", "valid", "test")
SAMPLE_RATES = (16000, 22050, 44100)
RESERVED_NAMES = ("all", "mixture", "residual")  # not allowed as stem names
RENAMED = {"referee_tracks": "cross_check_tracks", "unet_tall_channels": "unet_full_band_channels"}
REMOVED = ("demucs_channels", "demucs_max_channels", "demucs_strides", "attention_heads")
Changes = str | Iterable[str]  # key=value, separated by spaces in one string


def is_valid_stem_name(name: object) -> bool:
    """Whether a stem can have this name: it becomes a folder, a target and text on pages."""
    return is_safe_file_name(name) and name not in RESERVED_NAMES and not set(str(name)) & set("<>")


def _parse_list(value: Any) -> Any:
    """`8,4,2` on the command line is a tuple."""
    return tuple(value.split(",") if value else ()) if isinstance(value, str) else value


def _parse_groups(value: Any) -> Any:
    """`synth+fx->other,kick+snare->drums` on the command line: stems added under a new name."""
    if not isinstance(value, str):
        return value
    groups = {}
    for text in filter(None, value.split(",")):
        members, _, group = (part.strip() for part in text.partition("->"))
        stems = tuple(stem.strip() for stem in members.split("+"))
        if not (all(stems) and is_valid_stem_name(group)):
            names = ", ".join(RESERVED_NAMES)
            raise ValueError(f"a group is written stem+stem->name (not {names}), not {text!r}")
        groups[group] = stems
    return groups


CommaSeparated = BeforeValidator(_parse_list)


class Settings(BaseModel):
    """Every value that shapes a run (times: `_s`, levels: `_db`). Limits catch typing errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    profile: Literal["smoke", "demo", "musdb7", "musdb18"] = "demo"
    data: str | None = None  # dataset root; empty: the profile's own dataset
    target: str = "piano"  # stem to extract, several separated by commas, or 'all'
    seeds: int = Field(1, ge=1, le=100)  # trainings of each model

    # data
    sample_rate: int = Field(16000, ge=1, le=10**6)  # 16000, 22050 or 44100
    channels: int = Field(1, ge=1, le=2)
    groups: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_parse_groups)] = {}
    n_train_songs: int = Field(60, ge=1, le=100_000)  # built-in songs only, as the next four
    n_valid_songs: int = Field(12, ge=1, le=100_000)
    n_test_songs: int = Field(16, ge=1, le=100_000)
    song_min_s: float = Field(45.0, ge=4, le=3600)
    song_max_s: float = Field(90.0, ge=4, le=3600)

    # mixing and augmentation
    train_share: float = Field(1.0, gt=0, le=1)  # share of the training tracks, a fixed choice
    segment_s: float = Field(3.0, ge=0.1, le=600)
    batch_size: int = Field(4, ge=1, le=65_536)
    random_mix: bool = True  # stems of one example come from different tracks
    coherent_share: float = Field(0.5, ge=0, le=1)  # examples with stems of one track
    gain_db: float = Field(3.0, ge=0, le=60)  # random gain of each stem, +-
    flip_polarity: bool = True
    swap_channels: bool = True  # stereo only
    silent_share: float = Field(0.02, ge=0, le=1)  # examples with a silent target
    speed_semitones: int = Field(0, ge=0, le=12)  # random speed of each stem, +-
    loader_workers: int = Field(2, ge=1, le=64)  # threads that read segments ahead
    curriculum: bool = True  # two sources, then three, then all
    stage2_step: int = Field(50, ge=0, le=10**9)  # from this step on: three sources
    stage3_step: int = Field(150, ge=0, le=10**9)  # from this step on: all sources

    # models
    n_fft: int = Field(2048, ge=16, le=65_536)
    hop: int = Field(512, ge=4)
    unet_channels: int = Field(16, ge=1, le=1024)
    unet_depth: int = Field(5, ge=2, le=10)
    unet_full_band_channels: int = Field(256, ge=1, le=16_384)
    demucs_filter_ms: float = Field(64.0, gt=0, le=1000)  # length of the filters, two strides
    demucs_width: int = Field(512, ge=1, le=16_384)  # channels of encoder and decoder
    demucs_bottleneck_width: int = Field(256, ge=2, le=16_384)
    demucs_heads: int = Field(4, ge=1)  # of the self-attention

    # training
    start_from: str = ""  # run with the initial weights of the same models; empty: random
    steps: int = Field(500, ge=1, le=10**9)
    unet_lr: float = Field(2e-3, gt=0, le=10)
    demucs_lr: float = Field(2e-3, gt=0, le=10)
    warmup_steps: int = Field(100, ge=0, le=10**9)
    weight_decay: float = Field(1e-2, ge=0, le=10)
    grad_clip: float = Field(5.0, gt=0)  # largest norm of the gradients
    ema_decay: float = Field(0.99, ge=0, lt=1)  # moving average (EMA) of the weights
    valid_every: int = Field(125, ge=1, le=10**9)  # steps
    valid_s: float = Field(10.0, ge=0.1, le=3600)  # scored seconds of each validation track
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, ge=1, le=1_024)  # GPUs of this machine that share every batch
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    # evaluation, analysis, listening
    scorer: Literal["bss_eval", "museval"] = "bss_eval"  # museval: same scores, many times slower
    cross_check_tracks: int = Field(2, ge=0, le=10_000)  # test tracks scored by both programs
    ablations: Annotated[tuple[ModelName, ...], CommaSeparated] = ()
    data_study: bool = False  # train B1 and B2 with 10 and 30 % of the training tracks too
    excerpt_s: float = Field(10.0, ge=0.1, le=600)  # length of the excerpts in the players

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        """Give stored settings their present names; leave out those of removed models."""
        if not isinstance(values, dict):
            return values
        return {RENAMED.get(key, key): values[key] for key in values if key not in REMOVED}

    @model_validator(mode="after")
    def _check_consistency(self) -> Settings:
        """Refuse settings with which no model can be built or trained."""
        width, divisor = self.demucs_bottleneck_width, 2 ** (self.unet_depth + 1)
        errors = {
            f"sample_rate is none of {SAMPLE_RATES}": self.sample_rate not in SAMPLE_RATES,
            "song_min_s is above song_max_s": self.song_min_s > self.song_max_s,
            "hop is above half of n_fft": self.hop > self.n_fft // 2,
            f"n_fft is no multiple of {divisor} (2 ** (unet_depth + 1))": self.n_fft % divisor,
            f"demucs_heads does not divide demucs_bottleneck_width={width}": width
            % self.demucs_heads,
            "demucs_filter_ms is shorter than two samples": self.demucs_taps < 4,
            "segment_s is shorter than demucs_filter_ms": self.segment < self.demucs_taps,
        }
        for message, is_wrong in errors.items():
            if is_wrong:
                raise ValueError(message)
        return self

    @property
    def segment(self) -> int:
        """Training segment in samples."""
        return round(self.segment_s * self.sample_rate)

    @property
    def demucs_taps(self) -> int:
        """Length of the filters of B0, B1 and B2 in samples, an even number."""
        return 2 * round(self.demucs_filter_ms * self.sample_rate / 2000)


# What each profile changes: `smoke` is for tests, `demo` for two CPU cores, `musdb7` for the
# 7-second excerpts, `musdb18` for the full dataset on a GPU.
PROFILES = {
    "smoke": (
        "n_train_songs=3 n_valid_songs=1 n_test_songs=3 song_min_s=8 song_max_s=12 segment_s=2 "
        "batch_size=2 stage2_step=3 stage3_step=6 unet_channels=4 unet_depth=3 "
        "unet_full_band_channels=16 demucs_width=16 demucs_bottleneck_width=64 demucs_heads=2 "
        "steps=12 warmup_steps=2 valid_every=6 valid_s=5 excerpt_s=3 ablations=unet "
        "cross_check_tracks=1 data_study=true"
    ),
    "demo": "coherent_share=0.9 stage2_step=20 stage3_step=60 warmup_steps=50 unet_channels=8",
    "musdb7": (
        "target=vocals speed_semitones=2 unet_full_band_channels=64 steps=4000 ema_decay=0.998 "
        "valid_every=200 valid_s=7 excerpt_s=6"
    ),
    "musdb18": (
        "target=vocals sample_rate=22050 channels=2 segment_s=6 batch_size=16 unet_channels=32 "
        "unet_full_band_channels=512 demucs_width=1024 demucs_bottleneck_width=512 steps=60000 "
        "stage2_step=2000 stage3_step=6000 warmup_steps=1000 valid_every=2000 valid_s=60"
    ),
}


@dataclass(frozen=True)
class Run:
    """One run: its name, its settings and its folder `results/<name>/`."""

    name: str
    settings: Settings
    folder: Path

    def write_settings(self) -> None:
        """Store the settings with the run, before its first result."""
        write_text(self.folder / "settings.json", self.settings.model_dump_json(indent=2) + "\n")

    def variant(self, label: str, **changes: Any) -> Run:
        """Return the same run with other settings, in a folder inside this one, without studies."""
        changes = dict(ablations=(), data_study=False) | changes
        settings = self.settings.model_copy(update=changes)
        return Run(f"{self.name}/{label}", settings, self.folder / label)

    def model_folder(self, target: str, model: str, seed: int = 0) -> Path:
        """Return the folder of one trained model."""
        return self.folder / "models" / target / model / f"seed{seed}"

    def table(self, name: str) -> Path:
        """Return the path of a table."""
        return self.folder / "tables" / f"{name}.csv"


def resolve_settings(
    profile: str = "demo", data: str = "", target: str = "", overrides: Changes = ()
) -> Settings:
    """Return the profile's settings with the arguments on top; empty arguments change nothing.

    Parameters
    ----------
    overrides
        `key=value` strings, or one string of them separated by spaces.

    Raises
    ------
    ValueError
        Unknown profile, setting or value.
    """
    profile = profile or "demo"
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; there are: {', '.join(PROFILES)}.")
    values = {"profile": profile} | _parse_arguments(PROFILES[profile])
    values |= _parse_arguments(overrides, data, target)
    return _validate(Settings.model_validate, values, f"profile {profile}")


def create_or_load_run(
    profile: str = "demo", run: str = "", data: str = "", target: str = "", overrides: Changes = ()
) -> Run:
    """Return the run of that name (default: the profile's), with its stored settings if it exists.

    Nothing is written yet, see `Run.write_settings`.

    Raises
    ------
    ValueError
        As `resolve_settings`; an argument contradicts the stored settings; a collection's name.
    """
    settings = resolve_settings(profile, data, target, overrides)
    name = run or settings.profile
    folder = _run_folder(name)
    if runs := collection_runs(name):
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"{name!r} is a collection ({names}): choose one of its runs.")
    if not (folder / "settings.json").exists():
        return Run(name, settings, folder)
    stored = load_run(name)
    for key in ("profile", *_parse_arguments(overrides, data, target)):
        old, new = getattr(stored.settings, key), getattr(settings, key)
        if old != new:
            raise ValueError(
                f"Run {name!r} was made with {key}={old!r}, this call asks for {new!r}: "
                f"leave {key} out, choose another run name, or delete {folder}."
            )
    return stored


def load_run(name: str) -> Run:
    """Return an existing run with its stored settings.

    Raises
    ------
    FileNotFoundError
        There is no such run; the message lists the runs and collections there are.
    """
    path = _run_folder(name) / "settings.json"
    if not path.is_file():
        root = results_folder()
        paths = [*root.glob("*/settings.json"), *root.glob("*/*/settings.json")]
        names = ", ".join(sorted({found.relative_to(root).parts[0] for found in paths})) or "none"
        raise FileNotFoundError(f"No run {name!r} under {root}; there are: {names}.")
    settings = _validate(Settings.model_validate_json, path.read_bytes(), str(path))
    return Run(name, settings, path.parent)


def collection_runs(name: str) -> list[Run]:
    """Return the runs of a collection: a folder of runs that has no settings itself; else none."""
    folder = _run_folder(name)
    is_run, paths = (folder / "settings.json").exists(), sorted(folder.glob("*/settings.json"))
    return [] if is_run else [load_run(f"{name}/{path.parent.name}") for path in paths]


def results_folder() -> Path:
    """Return the folder of all runs: `results/` of this repository, or MSS_RESULTS."""
    return expand_path(os.environ.get("MSS_RESULTS") or "results")


def cache_folder() -> Path:
    """Return the folder of stem stores and built-in songs: `.cache/`, or MSS_CACHE."""
    return expand_path(os.environ.get("MSS_CACHE") or ".cache")


def expand_path(path: str | Path) -> Path:
    """Return an absolute path; relative paths start at the repository root, `~` is the home."""
    return ROOT / Path(path).expanduser()


def _run_folder(name: str) -> Path:
    if any(safe_name(part) != part for part in name.split("/")):
        raise ValueError(f"A run name has letters, digits, '.', '_' and '-', not {name!r:.80}.")
    return results_folder() / name


def _parse_arguments(overrides: Changes, data: str = "", target: str = "") -> dict:
    values = {}
    for item in overrides.split() if isinstance(overrides, str) else overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"A setting is given as key=value, not {item!r}.")
        if key in REMOVED:
            raise ValueError(f"Setting {key!r} was removed; see the settings demucs_*.")
        values[RENAMED.get(key, key)] = value
    arguments = dict(data=data, target=target)
    return values | {key: value for key, value in arguments.items() if value}


def _validate(validate: Callable[[Any], Settings], values: Any, source: str) -> Settings:
    """Return checked settings; the first of pydantic's errors becomes one sentence."""
    try:
        return validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, message = first["loc"][:1], first["msg"].removeprefix("Value error, ")
        text = f"The settings of {source} do not fit together: {message}"
        if name:
            text = f"Setting {name[0]!r:.80} of {source} is {first['input']!r:.80}: {message}"
        if first["type"] == "extra_forbidden":
            text = f"Unknown setting {name[0]!r:.80}; there are: {', '.join(Settings.model_fields)}"
        if first["type"] in ("json_invalid", "model_type"):
            text = f"{source} is damaged ({message}): fix it, or choose another run name"
        raise ValueError(f"{text}.") from None
