"""Studies that train more models: ablations of random mixing and of the curriculum.

Taught in notebook 05.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from mss_utils.config import Run
from mss_utils.data import Store, Track
from mss_utils.evaluation.scores import Estimates, score
from mss_utils.evaluation.statistics import compare, scores_by_seed
from mss_utils.files import write_text
from mss_utils.separation import read_estimate, write_estimates
from mss_utils.training import train

ABLATIONS = ("random_mix", "curriculum")  # settings that are turned off
ABLATION_COLUMNS = [
    "target",
    "model",
    "ablation",
    "metric",
    "with_it",
    "without_it",
    "median_difference",
    "ci_low",
    "ci_high",
    "p_wilcoxon",
    "p_corrected",
    "tracks",
    "seeds",
    "steps",
]


def ablation_runs(run: Run) -> dict[str, Run]:
    """For every ablation the same run with that one setting turned round: what was on is off."""
    return {
        name: run.variant(f"ablations/{name}", **{name: not getattr(run.settings, name)})
        for name in ABLATIONS
    }


def run_ablations(run: Run, store: Store, tracks: pd.DataFrame) -> pd.DataFrame:
    """What random mixing and the curriculum bring: differences of a model trained with to one trained without, on the test tracks.

    Trains what is missing, `steps` steps like the run's own models, whose scores are in `tracks`. Columns: those of `compare` but
    for a and b: model, the setting that was left out, and the medians with and without it. Nothing is chosen by these scores.
    """
    if not run.settings.ablations:
        table = pd.DataFrame(columns=ABLATION_COLUMNS)
        write_text(run.table("ablations"), table.to_csv(index=False))
        return table
    runs = ablation_runs(run)
    both = pd.concat([tracks, score_variants(run, store, runs, run.settings.ablations)])
    # In a run that goes without by its settings it is the ablation that has it.
    pair_of = lambda model, name: (model, f"{model} {name}")[
        :: 1 if getattr(run.settings, name) else -1
    ]
    pairs = {
        (model, name): pair_of(model, name)
        for model, name in itertools.product(run.settings.ablations, runs)
    }
    keys = {pair: dict(zip(("model", "ablation"), key)) for key, pair in pairs.items()}

    def median(target: str, label: str, metric: str) -> float:
        return (
            scores_by_seed(both[(both["target"] == target) & (both["model"] == label)], metric)
            .mean(axis=1)
            .median()
        )

    rows = []
    for row in compare(both, list(keys)).to_dict("records"):
        target, metric, sides = row["target"], row["metric"], (row["a"], row["b"])
        scores = dict(
            zip(("with_it", "without_it"), (median(target, side, metric) for side in sides))
        )
        rows.append(row | keys[sides] | scores | dict(steps=run.settings.steps))
    table = pd.DataFrame(rows, columns=ABLATION_COLUMNS).sort_values(
        ["target", "model", "ablation"], kind="stable", ignore_index=True
    )
    write_text(run.table("ablations"), table.to_csv(index=False))
    return table


def score_variants(
    run: Run, store: Store, variants: Mapping[str, Run], models: Iterable[str]
) -> pd.DataFrame:
    """Train what is missing of `models` in each variant of a run, and score it on the test tracks.

    Returns the table `tracks` of them; a model is called "<model> <variant>" there.
    """
    targets = store.targets(run.settings.target)
    models = list(models)
    for variant, model, seed in itertools.product(
        variants.values(), models, range(run.settings.seeds)
    ):
        for target in targets:
            train(variant, store, target, model, seed)
    for variant in variants.values():
        write_estimates(variant, store, models)

    def estimates_of(track: Track) -> Estimates:
        estimates = {}
        for (name, variant), model in itertools.product(variants.items(), models):
            for seed in range(run.settings.seeds):
                estimates[f"{model} {name}", seed] = np.stack(
                    [
                        read_estimate(variant, store, track, target, model, seed)
                        for target in targets
                    ]
                )
        return estimates

    return score(run.settings, store, estimates_of, n_cross_check=0)["tracks"]
