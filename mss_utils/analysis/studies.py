"""Studies that train more models: ablations of the mixing, and the amount of training data."""

import itertools
from functools import partial

import numpy as np
import pandas as pd

from mss_utils.config import SEQUENCE_MODELS, Run
from mss_utils.data import Store
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.evaluation.scores import score
from mss_utils.evaluation.statistics import compare, summarise
from mss_utils.files import write_text
from mss_utils.separation import read_all_estimates, write_estimates
from mss_utils.training import train

ABLATIONS = ("random_mix", "curriculum")  # settings that are switched
ABLATION_COLUMNS = ["target", "model", "ablation", "metric", "with_it", "without_it"]
ABLATION_COLUMNS += ["median_difference", "ci_low", "ci_high", "p_wilcoxon", "p_corrected"]
ABLATION_COLUMNS += ["tracks", "seeds", "steps"]
DATA_SHARES = (0.1, 0.3)  # all of it is the run itself
DATA_COLUMNS = ["target", "track", "model", "seed", "share", "SDR"]


def run_ablations(run: Run, store: Store, tracks: pd.DataFrame) -> pd.DataFrame:
    """Measure what random mixing and the curriculum bring to the models in `ablations`.

    Trains what is missing, for as many steps as the run's own models, whose scores are in the table
    `tracks`. Writes and returns the table `ablations`: medians with and without each setting, and
    paired differences as in the table `paired`.
    """
    models, parts, pairs = run.settings.ablations, [tracks], {}
    for name in ABLATIONS if models else ():
        switched_on = getattr(run.settings, name)
        variant = run.variant(f"ablations/{name}", **{name: not switched_on})
        scores = score_variant(variant, store, models)
        parts.append(scores.assign(model=scores["model"] + f" {name}"))
        for model in models:
            pair = (model, f"{model} {name}")
            pairs[pair if switched_on else pair[::-1]] = dict(model=model, ablation=name)
    both, rows = pd.concat(parts), []
    medians = summarise(both).set_index(["target", "model", "metric"])["median"]
    for row in compare(both, list(pairs)).to_dict("records"):
        a, b = (medians[row["target"], row[side], row["metric"]] for side in "ab")
        row |= pairs[row["a"], row["b"]] | dict(with_it=a, without_it=b, steps=run.settings.steps)
        rows.append(row)
    table = pd.DataFrame(rows, columns=ABLATION_COLUMNS)
    table = table.sort_values(["target", "model", "ablation"], kind="stable", ignore_index=True)
    write_text(run.table("ablations"), table.to_csv(index=False))
    return table


def data_amount(run: Run, store: Store, tracks: pd.DataFrame) -> pd.DataFrame:
    """Score B1 and B2 trained with 10 %, 30 % and all of the training tracks; else empty."""
    if not run.settings.data_study:
        return pd.DataFrame(columns=DATA_COLUMNS)
    parts = [tracks[tracks["model"].isin(SEQUENCE_MODELS)].assign(share=1.0)]
    for share in DATA_SHARES:
        label = f"data_study/{100 * share:g}-percent"
        variant = run.variant(label, train_share=share * run.settings.train_share)
        parts.append(score_variant(variant, store, SEQUENCE_MODELS).assign(share=share))
    return pd.concat(parts, ignore_index=True)[DATA_COLUMNS]


def data_gains(data_amount: pd.DataFrame, model: str) -> pd.DataFrame:
    """Compute the gain in SDR in dB from ten times the music, by track and seed."""
    rows = data_amount[data_amount["model"] == model]
    table = rows.pivot_table(index=["track", "seed"], columns="share", values="SDR")
    table = table.clip(upper=MAX_SCORE_DB).dropna()
    decades = np.log10(table.columns.to_numpy(float))
    slopes = np.polyfit(decades, table.to_numpy().T, deg=1)[0]
    return pd.Series(slopes, table.index).unstack("seed")


def score_variant(variant: Run, store: Store, models: tuple[str, ...]) -> pd.DataFrame:
    """Train what is missing of a variant of a run; return its table `tracks`."""
    targets, seeds = store.targets(variant.settings.target), range(variant.settings.seeds)
    for target, model, seed in itertools.product(targets, models, seeds):
        train(variant, store, target, model, seed)
    write_estimates(variant, store, models)
    keys = list(itertools.product(models, seeds))
    estimates_of = partial(read_all_estimates, variant, store, keys=keys)
    return score(variant.settings, store, estimates_of)["tracks"]
