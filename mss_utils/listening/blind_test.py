"""The blind test after ITU-R BS.1534-3 (MUSHRA): low anchor, hidden reference, mean opinions.

answers/*.json (one response per listener, from listening.html) -> tables/ratings.csv, opinion.csv
"""

import hashlib
from typing import Annotated, Literal, Self

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
RATED = ("reference", ANCHOR, *MODELS)  # versions that listeners rate; the reference is hidden
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
    width, low_rate = 128, round(2 * ANCHOR_HZ)  # with 128 zero crossings the edge is 100 Hz wide
    audio = torch.from_numpy(np.ascontiguousarray(mixture))
    for rates in ((sample_rate, low_rate), (low_rate, sample_rate)):
        audio = torchaudio.functional.resample(audio, *rates, lowpass_filter_width=width)
    return audio.numpy()[:, : mixture.shape[1]]


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


class Response(BaseModel):
    """The file that a listener downloads at the end of the blind test."""

    format: Literal["mss-answers-1"]
    run: str
    models: str | None
    listener: str = Field(min_length=1, max_length=200)
    pages: tuple[RatedExcerpt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for page in self.pages:
            if not sorted(page.ratings) == sorted(page.order) == sorted(RATED):
                raise ValueError(f"expected each of {', '.join(RATED)} once")
        if len({(page.target, page.track) for page in self.pages}) < len(self.pages):
            raise ValueError("an excerpt is rated twice")
        return self


def read_response(content: bytes, name: str) -> Response:
    """Parse one response; ValueError for any other file, with `name` in the message."""
    try:
        return Response.model_validate_json(content.decode("utf-8-sig"))
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
    except UnicodeDecodeError:
        reason = "not a text file"
    raise ValueError(
        f"{name} has no answers of the blind test ({reason}). "
        "Use the file that listening.html offers at the end."
    )


def import_responses(run: Run, files: list[tuple[str, bytes]]) -> None:
    """Copy responses, file names and contents, into `answers/` of a run, once all are checked.

    ValueError for a file that is not a response or rates another run.
    """
    contents = {}
    for name, content in files:
        response = read_response(content, name)
        if response.run != run.name:
            raise ValueError(f"{name} rates run {response.run!r}, not {run.name!r}: open that run.")
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = run.folder / "answers" / f"{safe_name(response.listener)}-{digest}.json"
        contents[path] = content
    for path, content in contents.items():
        with atomic_write(path) as part:
            part.write_bytes(content)


def response_files(path: str) -> list[tuple[str, bytes]]:
    """Read name and content of a response file or of all in a folder, for `import_responses`."""
    location = expand_path(path)
    files = sorted(location.glob("*.json")) if location.is_dir() else [location]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"No answers in {location}: name a file or folder of responses.")
    return [(file.name, file.read_bytes()) for file in files]


def write_ratings(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read `answers/` of a run; write and return the tables `ratings` and `opinion`.

    Both are empty without responses. ValueError for a file that is not a response.
    """
    paths = sorted((run.folder / "answers").glob("[!.]*.json"))
    names = {path.read_bytes(): str(path) for path in paths if path.is_file()}
    responses = [read_response(content, name) for content, name in names.items()]
    ratings = screen_responses(responses, run.name, weights_digest(run))
    opinions = mean_opinions(ratings)
    for name, table in zip(TABLES, (ratings, opinions), strict=True):
        write_text(run.table(name), table.to_csv(index=False))
    return ratings, opinions


def screen_responses(responses: list[Response], run: str, models: str | None) -> pd.DataFrame:
    """Return one row per rating, columns `RATING_COLUMNS`, with whether it counts and if not why.

    Excluded are responses that rate the hidden reference below 90 on more than 15 % of the excerpts
    (ITU-R BS.1534-3, section 4.1.2), and those on another run or on other weights than `models`.
    """
    rows = []
    for response in responses:
        reason = _exclusion_reason(response, run, models)
        for page in response.pages:
            for letter, version in zip(VERSION_LETTERS, page.order, strict=True):
                rating, heard_s = page.ratings[version], page.heard_s.get(version)
                row = (response.listener, page.target, page.track, version, letter, rating)
                rows.append((*row, heard_s, page.comment, not reason, reason))
    return pd.DataFrame(rows, columns=RATING_COLUMNS)


def _exclusion_reason(response: Response, run: str, models: str | None) -> str:
    if response.run != run:
        return f"about run {response.run}"
    if models and response.models and response.models != models:
        return "about models that have been trained again since"
    pages = response.pages
    missed = sum(page.ratings["reference"] < MIN_REFERENCE_RATING for page in pages)
    if missed > MAX_MISSED_SHARE * len(pages):
        return f"hidden reference under {MIN_REFERENCE_RATING} on {missed} of {len(pages)} excerpts"
    return ""


def mean_opinions(ratings: pd.DataFrame) -> pd.DataFrame:
    """Return the mean opinion of every version with its 95 % interval, columns `OPINION_COLUMNS`.

    The ratings of a listener are averaged first, because they are not independent. The interval is
    Student's t over listeners, clipped to the scale.
    """
    kept = ratings[ratings["kept"].astype(bool)]
    rows = []
    for target in kept["target"].unique():
        for model in RATED:
            group = kept[(kept["target"] == target) & (kept["model"] == model)]
            means = group.groupby("listener")["rating"].mean()
            mean, half_width = means.mean(), np.nan
            if len(means) >= MIN_LISTENERS:
                half_width = stats.t.ppf(0.975, len(means) - 1) * means.sem()
            interval = np.clip([mean - half_width, mean + half_width], 0, 100)
            counts = len(means), group["track"].nunique(), len(group)
            rows.append((target, model, mean, *interval, *counts))
    return pd.DataFrame(rows, columns=OPINION_COLUMNS)


def opinion_sentence(ratings: pd.DataFrame, opinions: pd.DataFrame, target: str) -> str:
    """Return the number of listeners and the mean opinions of the models as one sentence."""
    rows = ratings[ratings["target"] == target]
    if rows.empty:
        return "nobody has taken the blind test yet."
    count = rows["listener"].nunique()
    excluded = count - rows.loc[rows["kept"].astype(bool), "listener"].nunique()
    sentence = f"{count} listener{'s' * (count != 1)}, {excluded} left out"
    opinions = opinions[(opinions["target"] == target) & opinions["model"].isin(MODELS)]
    means = []
    for row in opinions.sort_values("mean", ascending=False).itertuples():
        interval = "" if np.isnan(row.ci_low) else f" [{row.ci_low:.0f}, {row.ci_high:.0f}]"
        means.append(f"{MODEL_LETTERS[row.model]} {row.mean:.0f}{interval}")
    return f"{sentence}; mean opinion {', '.join(means)} of 100." if means else f"{sentence}."
