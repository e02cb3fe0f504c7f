"""The blind test after ITU-R BS.1534-3 (MUSHRA): low anchor, hidden reference, mean opinions.

answers/*.json (one response per listener, from listening.html) -> tables/ratings.csv, opinion.csv
"""

import hashlib
import itertools
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Annotated, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, ValidationError, model_validator
from scipy import signal, stats

from mss_utils.config import COMPARED_MODELS, Run
from mss_utils.files import safe_name, write_bytes, write_text

ANCHOR = "anchor"
ANCHOR_HZ = 3500.0
# Versions that listeners rate; the reference is hidden.
RATED = ("reference", ANCHOR, *COMPARED_MODELS)
MIN_REFERENCE_RATING = 90  # of the hidden reference
MAX_MISSED_SHARE = 0.15  # of excerpts on which a listener may rate the hidden reference lower
MIN_LISTENERS = 3  # for a confidence interval
VERSION_LETTERS = "VWXYZ"  # names of the versions in the test; A and B are models
TABLES = ("ratings", "opinion")
RATING_COLUMNS = ["listener", "target", "track", "model", "letter", "rating", "heard_s", "comment"]
RATING_COLUMNS += ["kept", "reason"]
OPINION_COLUMNS = ["target", "model", "mean", "ci_low", "ci_high"]
OPINION_COLUMNS += ["listeners", "excerpts", "ratings"]


def low_anchor(mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    """Make the low anchor: the mixture `(channels, samples)` through a low-pass at 3.5 kHz.

    BS.1534-3 filters the reference, but the worst separation is one that removes nothing.
    """
    low_pass = signal.ellip(10, 0.01, 40, ANCHOR_HZ, output="sos", fs=sample_rate)
    return signal.sosfiltfilt(low_pass, mixture)


def weights_digest(run: Run) -> str | None:
    """Return 16 digits that identify the trained weights, None without any; responses name them."""
    paths = sorted(run.folder.glob("models/*/*/seed0/model.safetensors"))
    weights = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(weights).hexdigest()[:16] if paths else None


class RatedExcerpt(BaseModel):
    """The answers of one listener on one excerpt: ratings by version."""

    track: str
    target: str
    order: tuple[str, ...]
    ratings: dict[str, Annotated[float, Field(ge=0, le=100)]]
    heard_s: dict[str, float]
    comment: str = Field("", max_length=10_000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not sorted(self.ratings) == sorted(self.order) == sorted(RATED):
            raise ValueError(f"expected each of {', '.join(RATED)} once")
        return self


class Response(BaseModel):
    """The file that a listener downloads at the end of the blind test."""

    format: Literal["mss-answers-1"]
    run: str
    models: str | None  # see `weights_digest`
    listener: str = Field(min_length=1, max_length=200)
    pages: tuple[RatedExcerpt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({(page.target, page.track) for page in self.pages}) < len(self.pages):
            raise ValueError("an excerpt is rated twice")
        return self


def read_response(content: bytes, name: str) -> Response:
    """Parse one response; ValueError for any other file, with `name` in the message."""
    try:
        return Response.model_validate_json(content.removeprefix(BOM_UTF8))
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        advice = "Use the file that listening.html offers at the end."
        raise ValueError(f"{name} has no answers of the blind test ({reason}). {advice}") from None


def import_responses(run: Run, files: list[tuple[str, bytes]]) -> None:
    """Copy responses, file names and contents, into `answers/` of a run, once all are checked.

    ValueError for a file that is not a response or rates another run.
    """
    responses = [read_response(content, name) for name, content in files]
    for response, (name, _) in zip(responses, files, strict=True):
        if response.run != run.name:
            raise ValueError(f"{name} rates run {response.run!r}, not {run.name!r}: open that run.")
    for response, (_, content) in zip(responses, files, strict=True):
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = run.folder / "answers" / f"{safe_name(response.listener)}-{digest}.json"
        write_bytes(path, content)


def write_ratings(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read `answers/` of a run; write and return the tables `ratings` and `opinion`.

    Both are empty without responses. ValueError for a file that is not a response.
    """
    paths = sorted((run.folder / "answers").glob("[!.]*.json"))
    names = {path.read_bytes(): str(path) for path in paths}  # a copy of a file does not count
    responses = [read_response(content, name) for content, name in names.items()]
    digest = weights_digest(run)
    rows = [row for item in responses for row in _rating_rows(item, run.name, digest)]
    ratings = pd.DataFrame(rows, columns=RATING_COLUMNS)
    opinions = mean_opinions(ratings)
    for name, table in zip(TABLES, (ratings, opinions), strict=True):
        write_text(run.table(name), table.to_csv(index=False))
    return ratings, opinions


def _rating_rows(response: Response, run: str, models: str | None) -> Iterator[tuple]:
    """Yield a row per rating; it does not count for another run, other weights, a missed reference.

    ITU-R BS.1534-3, section 4.1.2: listeners are excluded who rate the hidden reference below 90 on
    more than 15 % of the excerpts.
    """
    pages, reason, n_pages = response.pages, "", len(response.pages)
    missed = sum(page.ratings["reference"] < MIN_REFERENCE_RATING for page in pages)
    if response.run != run:
        reason = f"about run {response.run}"
    elif models and response.models and response.models != models:
        reason = "about models that have been trained again since"
    elif missed > MAX_MISSED_SHARE * n_pages:
        reason = f"hidden reference under {MIN_REFERENCE_RATING} on {missed} of {n_pages} excerpts"
    for page in pages:
        key = (response.listener, page.target, page.track)
        for letter, version in zip(VERSION_LETTERS, page.order, strict=True):
            rating, heard_s = page.ratings[version], page.heard_s.get(version)
            yield *key, version, letter, rating, heard_s, page.comment, not reason, reason


def mean_opinions(ratings: pd.DataFrame) -> pd.DataFrame:
    """Return the mean opinion of every version with its 95 % interval, columns `OPINION_COLUMNS`.

    The ratings of a listener are averaged first, because they are not independent. The interval is
    Student's t over listeners, clipped to the scale.
    """
    kept = ratings[ratings["kept"].astype(bool)]
    rows = []
    for target, model in itertools.product(kept["target"].unique(), RATED):
        group = kept[(kept["target"] == target) & (kept["model"] == model)]
        means = group.groupby("listener")["rating"].mean()
        mean, half_width = means.mean(), np.nan
        if len(means) >= MIN_LISTENERS:
            half_width = stats.t.ppf(0.975, len(means) - 1) * means.sem()
        interval = np.clip([mean - half_width, mean + half_width], 0, 100)
        counts = len(means), group["track"].nunique(), len(group)
        rows.append((target, model, mean, *interval, *counts))
    return pd.DataFrame(rows, columns=OPINION_COLUMNS)
