"""The blind test after ITU-R BS.1534-3 (MUSHRA): what is rated, and from the listeners' answers to mean opinions.

    answers/*.json (one a listener, from listening.html) -> tables/ratings.csv -> tables/opinion.csv

Taught in notebook 06, reported in 05.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torchaudio
from pydantic import BaseModel, Field, ValidationError, model_validator
from scipy import stats

from mss_utils.settings import LETTERS, MODELS, Run, from_root, safe_name, write_text

ANCHOR = "anchor"
ANCHOR_HZ = 3500.0
RATED = ("reference", ANCHOR, *MODELS)
GOOD_EAR = 90  # the hidden reference is rated at least this
MAX_MISSED = 0.15  # share of excerpts on which a listener may rate it lower
MIN_LISTENERS = 3  # for an interval
TABLES = ("ratings", "opinion")
RATING_COLUMNS = ["listener", "target", "track", "model", "rating", "position", "heard_s", "comment", "kept", "reason"]
OPINION_COLUMNS = ["target", "model", "mean", "ci_low", "ci_high", "listeners", "excerpts", "ratings"]


def low_anchor(mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    """The spoilt version: the mixture `(channels, samples)` through a steep low-pass at 3.5 kHz.

    BS.1534-3 takes the reference through that filter. A separation fails by leaving the others in, so the bottom of the
    scale has them all; without the treble it is not the mixture that listeners know either.
    """
    width = 128  # zero crossings to each side: the stop band starts within 100 Hz
    new_rate = round(2 * ANCHOR_HZ)
    audio = torch.from_numpy(np.ascontiguousarray(mixture))
    down = torchaudio.functional.resample(audio, sample_rate, new_rate, lowpass_filter_width=width)
    return torchaudio.functional.resample(down, new_rate, sample_rate, lowpass_filter_width=width).numpy()[:, : mixture.shape[1]]


def models_of(run: Run) -> str | None:
    """What the rated models' weights are known by, 16 digits; None where a run has none. Answers name it, so old ones are told apart."""
    files = sorted(run.folder.glob("models/*/*/seed0/model.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] if files else None


class Page(BaseModel):
    """Ratings of one excerpt: version -> 0 to 100."""

    track: str
    target: str
    order: tuple[str, ...]
    ratings: dict[str, float]
    heard_s: dict[str, float]
    comment: str = Field("", max_length=10_000)

    @model_validator(mode="after")
    def _complete(self) -> Page:
        if set(self.ratings) != set(RATED) or set(self.order) != set(RATED):
            raise ValueError(f"rates {', '.join(self.ratings)}; expected {', '.join(RATED)}")
        if not all(0 <= rating <= 100 for rating in self.ratings.values()):
            raise ValueError(f"has a rating outside 0 to 100: {self.ratings}")
        return self


class Answers(BaseModel):
    """What a listener downloads at the end of the blind test."""

    format: Literal["mss-answers-1"]
    run: str
    models: str | None
    listener: str = Field(min_length=1, max_length=200)
    pages: tuple[Page, ...] = Field(min_length=1)


def read_answers(text: str, name: str) -> Answers:
    """The answers in one downloaded file; ValueError in one sentence where it holds anything else."""
    try:
        return Answers.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = " in " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        raise ValueError(
            f"{name} holds no answers of the blind test ({first['msg']}{where}); expected the file that listening.html offers at the end."
        ) from None


def add_answers(run: Run, files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Keep downloaded answers, `(file name, content)`, under `answers/` of the run; the same file twice is kept once.

    All are checked before any is written. Raises ValueError for a file that holds no answers, or those of another run.
    """
    checked = []
    for name, content in files:
        answers = read_answers(content.decode("utf-8", errors="replace"), name)
        if answers.run != run.name:
            raise ValueError(f"{name} has answers about run {answers.run!r}, this is {run.name!r}: open the run that was rated.")
        checked.append((run.folder / "answers" / f"{safe_name(answers.listener)}-{hashlib.sha256(content).hexdigest()[:16]}.json", content.decode("utf-8")))
    for path, text in checked:
        write_text(path, text)
    return [path for path, _ in checked]


def answer_files(place: str) -> list[tuple[str, bytes]]:
    """Name and content of an answers file, or of every one in a folder; a path starts at the repository root. FileNotFoundError without one."""
    path = from_root(place)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"No answers in {path}; expected a file that the blind test offered at its end, or a folder of them.")
    return [(file.name, file.read_bytes()) for file in files]


def ratings_of(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read every file under `answers/`, write `tables/ratings.csv` and `tables/opinion.csv`, and return the two.

    Both have no rows where nobody has answered yet. Raises ValueError for a file that holds no answers.
    """
    files = sorted((run.folder / "answers").glob("*.json"))
    ratings = screened([read_answers(file.read_text(encoding="utf-8"), str(file)) for file in files], models_of(run))
    opinions = opinion(ratings)
    for name, table in zip(TABLES, (ratings, opinions)):
        write_text(run.table(name), table.to_csv(index=False))
    return ratings, opinions


def screened(answers: list[Answers], models: str | None) -> pd.DataFrame:
    """One row a rating, columns `RATING_COLUMNS`, with whether it counts and if not why.

    Listeners are left out who rate the hidden reference under 90 on more than 15 % of the excerpts (ITU-R BS.1534-3, section 4.1.2),
    and answers about other weights than `models`.
    """
    rows = []
    for number, given in enumerate(answers):
        reason = _why_left_out(given, models)
        listener = f"{number + 1} {given.listener}"  # two may give the same name
        for page in given.pages:
            key = dict(listener=listener, target=page.target, track=page.track)
            rows += [
                key | dict(model=version, rating=page.ratings[version], position=position, heard_s=page.heard_s.get(version),
                           comment=page.comment, kept=not reason, reason=reason)
                for position, version in enumerate(page.order, 1)
            ]
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _why_left_out(given: Answers, models: str | None) -> str:
    if models and given.models and given.models != models:
        return "about models that have been trained anew since"
    missed = sum(page.ratings["reference"] < GOOD_EAR for page in given.pages)
    if missed > MAX_MISSED * len(given.pages):
        return f"hidden reference under {GOOD_EAR} on {missed} of {len(given.pages)} excerpts"
    return ""


def opinion(ratings: pd.DataFrame) -> pd.DataFrame:
    """Mean opinion of every version with its 95 % interval, columns `OPINION_COLUMNS`.

    A listener's ratings are averaged first: his excerpts are no independent witnesses. The interval is Student's t over
    listeners, from three on.
    """
    kept = ratings[ratings["kept"].astype(bool)]
    rows = []
    for target, model in itertools.product(kept["target"].unique(), RATED):
        group = kept[(kept["target"] == target) & (kept["model"] == model)]
        means = group.groupby("listener")["rating"].mean()
        mean, half = means.mean(), np.nan
        if len(means) >= MIN_LISTENERS:
            half = stats.t.ppf(0.975, len(means) - 1) * means.sem()
        rows.append((target, model, mean, mean - half, mean + half, len(means), group["track"].nunique(), len(group)))
    return pd.DataFrame(rows, columns=OPINION_COLUMNS)


def opinion_sentence(ratings: pd.DataFrame, opinions: pd.DataFrame, target: str) -> str:
    """Who listened and what they think of the models, in one sentence."""
    listeners = ratings[ratings["target"] == target].drop_duplicates("listener")
    if listeners.empty:
        return "nobody has taken the blind test yet."
    left_out = int((~listeners["kept"].astype(bool)).sum())
    heard = f"{len(listeners)} listener{'s' * (len(listeners) != 1)}, {left_out} left out"
    rows = opinions[(opinions["target"] == target) & opinions["model"].isin(MODELS)].sort_values("mean", ascending=False)
    said = [f"{LETTERS[row.model]} {row.mean:.0f}" + ("" if np.isnan(row.ci_low) else f" [{row.ci_low:.0f}, {row.ci_high:.0f}]") for row in rows.itertuples()]
    return f"{heard}; mean opinion {', '.join(said)} of 100." if said else f"{heard}."
