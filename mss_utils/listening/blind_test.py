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

from mss_utils.config import MODEL_LETTERS, MODELS, Run, expand_path
from mss_utils.files import atomic_write, safe_name, write_text

ANCHOR = "anchor"
ANCHOR_HZ = 3500.0
RATED = ("reference", ANCHOR, *MODELS)
GOOD_EAR = 90  # the hidden reference is rated at least this
MAX_MISSED = 0.15  # share of excerpts on which a listener may rate it lower
MIN_LISTENERS = 3  # for an interval
TABLES = ("ratings", "opinion")
LETTERS_SHOWN = "VWXYZ"  # what a listener knows the versions of an excerpt by, in the order that was drawn; A and B are models elsewhere
RATING_COLUMNS = [
    "listener",
    "target",
    "track",
    "model",
    "letter",
    "rating",
    "heard_s",
    "comment",
    "kept",
    "reason",
]
OPINION_COLUMNS = [
    "target",
    "model",
    "mean",
    "ci_low",
    "ci_high",
    "listeners",
    "excerpts",
    "ratings",
]


def low_anchor(mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    """The spoilt version: the mixture `(channels, samples)` through a steep low-pass at 3.5 kHz.

    BS.1534-3 takes the reference through that filter. A separation fails by leaving the others in, so the bottom of the
    scale has them all; without the treble it is not the mixture that listeners know either.
    """
    width = 128  # zero crossings to each side: the stop band starts within 100 Hz
    new_rate = round(2 * ANCHOR_HZ)
    audio = torch.from_numpy(np.ascontiguousarray(mixture))
    down = torchaudio.functional.resample(audio, sample_rate, new_rate, lowpass_filter_width=width)
    return torchaudio.functional.resample(
        down, new_rate, sample_rate, lowpass_filter_width=width
    ).numpy()[:, : mixture.shape[1]]


def models_of(run: Run) -> str | None:
    """What the rated models' weights are known by, 16 digits; None where a run has none. Answers name it, so old ones are told apart."""
    files = sorted(run.folder.glob("models/*/*/seed0/model.safetensors"))
    return (
        hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        if files
        else None
    )


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
        if not set(self.ratings) == set(RATED) == set(self.order) or len(self.order) != len(RATED):
            raise ValueError(
                f"rates {', '.join(self.ratings)} in the order {', '.join(self.order)}; expected each of {', '.join(RATED)} once"
            )
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

    @model_validator(mode="after")
    def _once(self) -> Answers:
        if len({(page.target, page.track) for page in self.pages}) < len(self.pages):
            raise ValueError("rates an excerpt twice")
        return self


def read_answers(content: bytes, name: str) -> Answers:
    """The answers in one downloaded file; ValueError in one sentence where it holds anything else."""
    try:
        return Answers.model_validate_json(content.decode("utf-8-sig"))
    except ValueError as error:  # pydantic's, and that of a file that is no text
        first = (
            error.errors()[0]
            if isinstance(error, ValidationError)
            else dict(msg=str(error), loc=())
        )
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
        answers = read_answers(content, name)
        if answers.run != run.name:
            raise ValueError(
                f"{name} has answers about run {answers.run!r}, this is {run.name!r}: open the run that was rated."
            )
        checked.append(
            (
                run.folder
                / "answers"
                / f"{safe_name(answers.listener)}-{hashlib.sha256(content).hexdigest()[:16]}.json",
                content,
            )
        )
    for path, content in checked:
        with atomic_write(path) as part:
            part.write_bytes(content)
    return [path for path, _ in checked]


def answer_files(place: str) -> list[tuple[str, bytes]]:
    """Name and content of an answers file, or of every one in a folder; a path starts at the repository root. FileNotFoundError without one."""
    path = expand_path(place)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"No answers in {path}; expected a file that the blind test offered at its end, or a folder of them."
        )
    return [(file.name, file.read_bytes()) for file in files]


def ratings_of(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read every file under `answers/`, write `tables/ratings.csv` and `tables/opinion.csv`, and return the two.

    Both have no rows where nobody has answered yet; of equal files one is read. Raises ValueError for a file that holds no answers.
    """
    files = {
        file.read_bytes(): file
        for file in sorted((run.folder / "answers").glob("[!.]*.json"))
        if file.is_file()
    }
    ratings = screened(
        [read_answers(content, str(file)) for content, file in files.items()],
        run.name,
        models_of(run),
    )
    opinions = opinion(ratings)
    for name, table in zip(TABLES, (ratings, opinions)):
        write_text(run.table(name), table.to_csv(index=False))
    return ratings, opinions


def screened(answers: list[Answers], run_name: str, models: str | None) -> pd.DataFrame:
    """One row a rating, columns `RATING_COLUMNS`, with whether it counts and if not why.

    Answers are left out that rate the hidden reference under 90 on more than 15 % of the excerpts (ITU-R BS.1534-3, section 4.1.2), and
    those about another run or other weights than `models`. Answers under one name are one listener's.
    """
    rows = []
    for given in answers:
        reason = _why_left_out(given, run_name, models)
        for page in given.pages:
            key = dict(listener=given.listener, target=page.target, track=page.track)
            rows += [
                key
                | dict(
                    model=version,
                    letter=letter,
                    rating=page.ratings[version],
                    heard_s=page.heard_s.get(version),
                    comment=page.comment,
                    kept=not reason,
                    reason=reason,
                )
                for letter, version in zip(LETTERS_SHOWN, page.order)
            ]
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _why_left_out(given: Answers, run_name: str, models: str | None) -> str:
    if given.run != run_name:
        return f"about run {given.run}"
    if models and given.models and given.models != models:
        return "about models that have been trained anew since"
    missed = sum(page.ratings["reference"] < GOOD_EAR for page in given.pages)
    if missed > MAX_MISSED * len(given.pages):
        return f"hidden reference under {GOOD_EAR} on {missed} of {len(given.pages)} excerpts"
    return ""


def opinion(ratings: pd.DataFrame) -> pd.DataFrame:
    """Mean opinion of every version with its 95 % interval, columns `OPINION_COLUMNS`.

    A listener's ratings are averaged first: the excerpts are no independent witnesses. The interval is Student's t over
    listeners, from three on, and ends where the scale does.
    """
    kept = ratings[ratings["kept"].astype(bool)]
    rows = []
    for target, model in itertools.product(kept["target"].unique(), RATED):
        group = kept[(kept["target"] == target) & (kept["model"] == model)]
        means = group.groupby("listener")["rating"].mean()
        mean, half = means.mean(), np.nan
        if len(means) >= MIN_LISTENERS:
            half = stats.t.ppf(0.975, len(means) - 1) * means.sem()
        ends = np.clip([mean - half, mean + half], 0, 100)
        rows.append((target, model, mean, *ends, len(means), group["track"].nunique(), len(group)))
    return pd.DataFrame(rows, columns=OPINION_COLUMNS)


def opinion_sentence(ratings: pd.DataFrame, opinions: pd.DataFrame, target: str) -> str:
    """Who listened and what they think of the models, in one sentence."""
    heard = ratings[ratings["target"] == target]
    count, kept = (
        heard["listener"].nunique(),
        heard.loc[heard["kept"].astype(bool), "listener"].nunique(),
    )
    if not count:
        return "nobody has taken the blind test yet."
    heard = f"{count} listener{'s' * (count != 1)}, {count - kept} left out"
    rows = opinions[(opinions["target"] == target) & opinions["model"].isin(MODELS)].sort_values(
        "mean", ascending=False
    )
    said = [
        f"{MODEL_LETTERS[row.model]} {row.mean:.0f}"
        + ("" if np.isnan(row.ci_low) else f" [{row.ci_low:.0f}, {row.ci_high:.0f}]")
        for row in rows.itertuples()
    ]
    return f"{heard}; mean opinion {', '.join(said)} of 100." if said else f"{heard}."
