"""Facts of a report: numbers as text, labels and outcomes, computed from the tables of the runs.

    results/<run>/{tables,models}, settings.json, environment.json --> facts.json --> report.typ

Typst has the fixed text and the layout. One run and a collection of runs have facts of the same
form: a *part* is one target of one run, and every table of results has a row or a column per part.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pandas as pd

from mss_utils.analysis import INTERVENTIONS, whole_band_rows
from mss_utils.analysis.attack import APART_S, ATTACK_S
from mss_utils.analysis.hypotheses import NEGLIGIBLE_DB
from mss_utils.analysis.repetition import BURST_DB
from mss_utils.config import MODEL_LETTERS, MODELS, SEQUENCE_MODELS, SPLITS, Run, resolve_settings
from mss_utils.environment import dataset_kind
from mss_utils.evaluation.statistics import MIN_SEEDS, PAIRS, detectable_difference
from mss_utils.figures import LABELS, format_number
from mss_utils.report import tables
from mss_utils.report.wording import argument, interval, join, plain, quantity, seconds, spell

SCORE_METRICS = ("SDR", "SIR", "SAR", "utterance_SDR")
MUSIC = dict(songs="built-in songs", excerpts="MUSDB18 excerpts", musdb="MUSDB18")
ABLATION_NAMES = dict(random_mix="random mixing", curriculum="the curriculum")
# Ids of hypotheses begin so.
SEQUENCE, PHASE, ATTACK = "sequence_gain", "phase_true_magnitude", "attack_minus_sustain"
PHASE_UNITS = dict(sdr_true_magnitude="dB", phase_error_rad="rad")
ATTACK_UNITS = dict(attack_sdr="dB", sustain_sdr="dB", attack_time_error_ms="ms")
VERDICT_MARKS = {"supported": "✓", "not supported": "✗", "cannot tell": "?"}


@dataclass(frozen=True)
class Part:
    """One target of one run; `label` names it in the report."""

    run: Run
    target: str
    label: str

    def rows(self, table: str) -> pd.DataFrame:
        """Return the rows of a table about this target."""
        rows = tables.read_table(self.run, table)
        return rows[rows["target"] == self.target]

    def median(self, model: str, metric: str = "SDR") -> float:
        """Return the median score of a model."""
        rows = self.rows("summary").set_index(["model", "metric"])
        return float(rows["median"].get((model, metric), np.nan))

    def paired(self, a: str, b: str, metric: str = "SDR") -> pd.Series:
        """Return the paired difference a - b."""
        return self.rows("paired").set_index(["a", "b", "metric"]).loc[(a, b, metric)]

    def hypotheses(self, prefix: str) -> list[dict[str, Any]]:
        """Return the measured hypotheses whose id begins with `prefix`."""
        rows = self.rows("hypotheses")
        rows = rows[rows["id"].str.startswith(prefix)]
        return rows.dropna(subset="effect").to_dict("records")


def reported_parts(runs: list[Run]) -> list[Part]:
    """Return the parts of the runs that are no studies; of all runs if there are only studies."""
    runs = [run for run in runs if not tables.is_study(run)] or runs
    pairs = [(run, target) for run in runs for target in tables.evaluated_targets(run)]
    counts = Counter(target for _, target in pairs)
    return [
        Part(run, target, f"{target} ({music(run)})" if counts[target] > 1 else target)
        for run, target in pairs
    ]


def music(run: Run) -> str:
    """Return the name of the dataset of a run."""
    return MUSIC.get(_kind(run)) or str(tables.read_environment(run)["dataset"]["name"])


def _kind(run: Run) -> str:
    return dataset_kind(run.settings, tables.read_environment(run)["dataset"])


def collect_facts(runs: list[Run], name: str, is_collection: bool) -> dict[str, Any]:
    """Return the facts of a report on one run, or on the runs of a collection."""
    parts = reported_parts(runs)
    shown = list({part.run.name: part.run for part in parts}.values())
    n_seeds = int(min(tables.read_table(run, "paired")["seeds"].min() for run in shown))
    newest = max(tables.read_environment(run)["date"] for run in shown)
    return dict(
        name=name,
        is_collection=is_collection,
        date=f"{date.fromisoformat(newest):%-d %B %Y}",
        few_seeds=n_seeds < MIN_SEEDS,
        seeds=quantity(n_seeds, "training"),
        parts=[dict(target=part.target, label=part.label) for part in parts],
        rules=dict(
            negligible_db=plain(NEGLIGIBLE_DB),
            min_seeds=spell(MIN_SEEDS),
            burst_db=plain(-BURST_DB),
            apart_ms=plain(1000 * APART_S),
            attack_ms=plain(1000 * ATTACK_S),
        ),
        data=_data_facts(shown),
        method=_method_facts(shown),
        training=_training_facts(parts),
        scores=_score_facts(parts) | dict(cross_check=_cross_check(runs)),
        questions=_question_facts(parts),
        studies=_study_facts(runs),
        listening=_listening_facts(shown, parts),
        reproduce=_reproduce_facts(runs, name, is_collection),
    )


def _same_or_each(runs: list[Run], texts: Iterable[str]) -> str:
    """Return the text that all runs share, or the text of each with its dataset."""
    by_run = list(texts)
    if len(set(by_run)) == 1:
        return by_run[0]
    return join(f"{text} ({music(run)})" for text, run in zip(by_run, runs, strict=True))


def _data_facts(runs: list[Run]) -> dict[str, Any]:
    rows, datasets = [], {}
    for run in runs:
        dataset = tables.read_environment(run)["dataset"]
        datasets[_kind(run)] = dict(name=music(run), stems=join(dataset["stems"]))
        sizes = [
            f"{quantity(dataset['tracks'][split], 'track', spelled=False)}, "
            f"{seconds(3600 * dataset['hours'][split])}"
            for split in SPLITS
        ]
        rows.append([music(run), join(tables.evaluated_targets(run)), *sizes])
    rates = sorted({tables.read_environment(run)["sample_rate"] for run in runs})
    return dict(
        datasets=datasets,
        rates=join(f"{plain(rate / 1000)} kHz" for rate in rates),
        half_rates=join(f"{plain(rate / 2000)} kHz" for rate in rates),
        stereo=any(run.settings.channels == 2 for run in runs),
        rows=rows,
    )


def _method_facts(runs: list[Run]) -> dict[str, Any]:
    every = [run.settings for run in runs]
    settings, rate = every[0], tables.read_environment(runs[0])["sample_rate"]
    texts = {}
    for key in type(settings).model_fields:
        values = [getattr(one, key) for one in every]
        if key in ("coherent_share", "silent_share"):
            texts[key] = _same_or_each(runs, (f"{plain(100 * value)} %" for value in values))
        else:
            texts[key] = _same_or_each(runs, map(plain, values))
    target = tables.evaluated_targets(runs[0])[0]
    models = {model: tables.read_model_json(runs[0], target, model) for model in MODELS}
    return dict(
        settings=texts,
        random_mix=any(one.random_mix for one in every),
        curriculum=any(one.curriculum for one in every),
        flip_polarity=any(one.flip_polarity for one in every),
        speed=join(f"{n} semitones" for n in sorted({one.speed_semitones for one in every} - {0})),
        window_ms=_same_or_each(runs, (f"{1000 * one.n_fft / rate:.0f} ms" for one in every)),
        taps_ms=plain(round(512_000 / rate, 1)) + " ms",
        n_filters=f"{settings.demucs_taps:,}",
        frame_rate=f"{2 * rate / settings.demucs_taps:.1f}",
        parameters={model: f"{values['parameters']:,}" for model, values in models.items()},
    )


def _training_facts(parts: list[Part]) -> dict[str, Any]:
    rows, at_end, early = [], [], []
    for part, model in itertools.product(parts, MODELS):
        cost = part.rows("cost").groupby("model")[["inference_rtf", "peak_memory_mb"]].mean()
        training = tables.read_model_json(part.run, part.target, model)
        step, n_steps = training["best_step"], training["steps"]
        name = f"{MODEL_LETTERS[model]} on {part.label}"
        if step == n_steps:
            at_end.append(name)
        elif step <= n_steps / 2:
            early.append(name)
        row = [part.label if model == MODELS[0] else "", LABELS[model]]
        row += [f"{training['parameters']:,}", f"{step} of {n_steps}"]
        row += [f"{format_number(training['valid_sdr'])} dB", seconds(training["train_s"])]
        row.append(f"{1000 * cost.loc[model, 'inference_rtf']:.1f} ms/s")
        rows.append([*row, f"{cost.loc[model, 'peak_memory_mb']:.0f} MB"])
    n_at_end = f"{quantity(len(at_end), 'training').capitalize()} of {len(rows)}"
    return dict(rows=rows, n_at_end=n_at_end, at_end=join(at_end), early=join(early))


def _outcome(row: Mapping[str, Any]) -> str:
    """Return where an interval is: above or below zero, open (around zero) or unknown."""
    if np.isnan([row["ci_low"], row["ci_high"]]).any():
        return "unknown"
    if row["ci_low"] > 0:
        return "above"
    return "below" if row["ci_high"] < 0 else "open"


def _comparison(part: Part, a: str, b: str) -> dict[str, Any]:
    """Return the paired comparison in SDR; `first` is the model that is ahead, if one is."""
    row = part.paired(a, b)
    outcome = _outcome(row)
    if outcome == "below":
        a, b = b, a
        row = dict(row, median_difference=-row["median_difference"])
        row |= dict(ci_low=-row["ci_high"], ci_high=-row["ci_low"])
    sign = "+" if outcome == "open" else ""
    size = f"{format_number(row['median_difference'], sign=sign)} dB {interval(row, sign=sign)}"
    names = dict(first=MODEL_LETTERS[a], second=MODEL_LETTERS[b])
    return names | dict(outcome=outcome, size=size, confirmed=bool(row["p_corrected"] < 0.05))


def _score_facts(parts: list[Part]) -> dict[str, Any]:
    gaps = []
    for part in parts:
        gap = part.median("irm") - part.median("unet")
        side = "above" if gap > 0 else "below"
        gaps.append(f"{format_number(abs(gap))} dB {side} A for {part.label}")
    tracks = pd.concat([part.rows("tracks") for part in parts])
    tracks = tracks.query("model == 'unet' and seed == 0")
    return dict(
        comparisons=[[part.label, [_comparison(part, *pair) for pair in PAIRS]] for part in parts],
        mask_gap=join(gaps),
        frames={key: f"{tracks[key].sum():,}" for key in ("usable_frames", "frames")},
        tables=[_score_table(part) for part in parts],
        paired=[_paired_rows(part) for part in parts],
    )


def _score_table(part: Part) -> dict[str, Any]:
    summary = part.rows("summary").set_index(["model", "metric"])
    rows = []
    for model in summary.index.unique("model"):
        cells = []
        for metric in SCORE_METRICS:
            row = summary.loc[(model, metric)]
            if (model, metric) == ("mixture", "SAR") or np.isnan(row["median"]):
                cells.append(["–", ""])  # nothing was processed: no artifacts
            else:
                cells.append([format_number(row["median"]), interval(row, digits=1)])
        mean = format_number(summary.loc[(model, "SDR"), "mean"])
        rows.append(dict(model=model, label=LABELS[model], cells=[*cells, [mean, ""]]))
    n_tracks = quantity(int(summary["tracks"].max()), "track", spelled=False)
    names = dict(target=part.target, music=music(part.run), tracks=n_tracks)
    best = max(MODELS, key=lambda model: np.nan_to_num(part.median(model), nan=-np.inf))
    return names | dict(best=best, letter=MODEL_LETTERS[best], rows=rows)


def _paired_rows(part: Part) -> list[list[str]]:
    scores = part.rows("tracks").groupby(["model", "track"])[list(SCORE_METRICS)].mean()
    rows = []
    for (a, b), metric in itertools.product(PAIRS, SCORE_METRICS):
        row = part.paired(a, b, metric)
        differences = (scores.loc[a, metric] - scores.loc[b, metric]).dropna()
        name = f"{MODEL_LETTERS[a]} − {MODEL_LETTERS[b]}" if metric == SCORE_METRICS[0] else ""
        cells = [name, metric.replace("_", " ")]
        cells.append(format_number(row["median_difference"], sign="+"))
        cells.append(interval(row, sign="+"))
        cells.append(format_number(detectable_difference(row)))
        cells.append("–" if np.isnan(row["p_corrected"]) else f"{row['p_corrected']:.2g}")
        rows.append([*cells, f"{(differences > 0).sum()} of {len(differences)}"])
    return rows


def _cross_check(runs: list[Run]) -> dict[str, str]:
    checked = pd.concat([tables.read_table(run, "cross_check") for run in runs])
    largest = checked["largest_difference_db"].max()
    bound = f"below 1e{int(np.floor(np.log10(largest))) + 1} dB" if largest > 0 else "zero"
    return dict(scores=f"{int(checked['scores'].sum()):,}", bound=bound)


def _question_facts(parts: list[Part]) -> dict[str, Any]:
    b1, b2 = SEQUENCE_MODELS
    cases = dict(
        b1=[_outcome(row) for part in parts for row in part.hypotheses(f"{SEQUENCE}_b1")],
        b2=[_outcome(row) for part in parts for row in part.hypotheses(f"{SEQUENCE}_b2")],
        waveform=[_standing(part.paired(b, "unet")) for part in parts for b in SEQUENCE_MODELS],
        attention=[_standing(part.paired(b2, b1)) for part in parts],
        phase=[_outcome(row) for part in parts for row in part.hypotheses(PHASE)],
        attack=[_outcome(row) for part in parts for row in part.hypotheses(ATTACK)],
    )
    bands = [[part.label, whole_band_rows(part.rows("phase"))] for part in parts]
    onsets = [[part.label, part.rows("attack")] for part in parts]
    return dict(
        answer={name: _shares(outcomes) for name, outcomes in cases.items()},
        bottleneck=[[part.label, _bottleneck_rows(part)] for part in parts],
        sequence=[[part.label, _common_outcome(part, SEQUENCE)] for part in parts],
        phase_scores=[[label, _medians(rows, **PHASE_UNITS)] for label, rows in bands],
        phase=[[part.label, _common_outcome(part, PHASE)] for part in parts],
        repetition=_repetition_facts(parts),
        attack_scores=[[label, _medians(rows, **ATTACK_UNITS)] for label, rows in onsets],
        attack=[[part.label, _common_outcome(part, ATTACK)] for part in parts],
        hypotheses=_hypothesis_rows(parts),
    )


def _bottleneck_rows(part: Part) -> list[dict[str, Any]]:
    """Return for B1 and B2 what sequence modelling is worth and what every intervention costs."""
    effects = part.rows("hypotheses").set_index("id")
    prefixes = (SEQUENCE, *(f"bottleneck_{name}" for name in INTERVENTIONS))
    rows = []
    for model in SEQUENCE_MODELS:
        letter = MODEL_LETTERS[model].lower()
        cells = [_effect_cell(effects.loc[f"{prefix}_{letter}"]) for prefix in prefixes]
        rows.append(dict(label=LABELS[model], cells=cells))
    return rows


def _effect_cell(row: Mapping[str, Any] | pd.Series) -> list[str]:
    """Return effect and interval of a hypothesis as text."""
    return [format_number(row["effect"], sign="+"), interval(row, sign="+")]


def _standing(row: Mapping[str, Any]) -> str:
    """Return near for an interval within the negligible range, else its outcome."""
    is_near = np.abs([row["ci_low"], row["ci_high"]]).max() <= NEGLIGIBLE_DB
    return "near" if is_near else _outcome(row)


def _shares(outcomes: Iterable[str]) -> dict[str, str]:
    """Return outcome -> ` in two of four cases`; empty if there is one case only."""
    counts = Counter(outcomes)
    total = counts.total()
    return {
        outcome: f" in {spell(count)} of {spell(total)} cases" if total > 1 else ""
        for outcome, count in counts.items()
    }


def _common_outcome(part: Part, prefix: str) -> str:
    """Return the outcome of both waveform models, open if they differ."""
    outcomes = {_outcome(row) for row in part.hypotheses(prefix)} or {"unknown"}
    return outcomes.pop() if len(outcomes) == 1 else "open"


def _medians(rows: pd.DataFrame, **units: str) -> dict[str, str]:
    """Return the medians of the models by column; `units` are columns with their units."""
    medians = rows.replace([np.inf, -np.inf], np.nan).groupby("model")[list(units)].median()
    texts = {}
    for column, unit in units.items():
        digits, sign = (1, "+") if unit == "ms" else (2, "")
        texts[column] = join(
            f"{format_number(value, digits, sign)} {unit} for {MODEL_LETTERS[model]}"
            for model, value in medians[column].reindex(MODELS).items()
        )
    return texts


def _repetition_facts(parts: list[Part]) -> dict[str, int] | None:
    gains = [row for part in parts for row in part.hypotheses("repetition_gain_b2_")]
    own = [row for row in gains if "minus" not in row["id"]]
    more = [row for row in gains if "minus" in row["id"]]
    if not own:
        return None
    return dict(
        total=len(own),
        above=sum(row["ci_low"] > 0 for row in own),
        not_supported=sum(row["verdict"] == "not supported" for row in own),
        differences=len(more),
        ahead=sum(row["ci_low"] > 0 for row in more),
    )


def _hypothesis_rows(parts: list[Part]) -> list[dict[str, Any]]:
    table = pd.concat([part.rows("hypotheses").assign(part=i) for i, part in enumerate(parts)])
    rows = []
    for _, of_parts in table.groupby("id", sort=False):
        cells = [["–", "", ""] for _ in parts]  # a run with short segments lacks long lags
        for row in of_parts.to_dict("records"):
            verdict = str(row["verdict"])
            mark = VERDICT_MARKS.get(verdict, verdict)
            cells[int(row["part"])] = [*_effect_cell(row), mark]
        first = of_parts.iloc[0]
        measure = f"{first['measure']}, {first['unit']}"
        rows.append(dict(hypothesis=first["hypothesis"], measure=measure, cells=cells))
    return rows


def _study_facts(runs: list[Run]) -> dict[str, Any]:
    ablations, amounts = [], []
    for run in runs:
        steps = f"{music(run)}, {run.settings.steps} steps"
        rows = tables.read_table(run, "ablations")
        for row in rows[rows["metric"] == "SDR"].to_dict("records"):
            scores = [format_number(row[key]) for key in ("with_it", "without_it")]
            difference = format_number(row["median_difference"], sign="+")
            left_out = [MODEL_LETTERS[row["model"]], ABLATION_NAMES[row["ablation"]]]
            cells = [f"{row['target']} ({steps})", *left_out, *scores]
            ablations.append([*cells, f"{difference} {interval(row, sign='+')}"])
        amount = tables.read_table(run, "data_amount")
        for (target, model), rows in amount.groupby(["target", "model"]):
            shares = rows.groupby("share")["SDR"].median().items()
            texts = (f"{format_number(sdr)} dB with {plain(100 * part)} %" for part, sdr in shares)
            amounts.append([f"{target} ({steps})", f"{MODEL_LETTERS[model]}: {join(texts)}."])
    return dict(ablations=ablations, data_amount=amounts)


def _listening_facts(runs: list[Run], parts: list[Part]) -> dict[str, Any]:
    ratings = pd.concat([tables.read_table(run, "ratings") for run in runs])
    n_listeners = ratings["listener"].nunique()
    n_excluded = n_listeners - ratings[ratings["kept"].astype(bool)]["listener"].nunique()
    rows = []
    for part in parts:
        for row in part.rows("opinion").to_dict("records"):
            cells = [part.label, LABELS[row["model"]], f"{row['mean']:.0f}"]
            rows.append([*cells, interval(row, digits=0), format_number(part.median(row["model"]))])
    return dict(
        listeners=quantity(n_listeners, "listener").capitalize() if n_listeners else "",
        excluded=quantity(n_excluded, "listener") if n_excluded else "",
        rows=rows,
    )


def _reproduce_facts(runs: list[Run], name: str, is_collection: bool) -> dict[str, Any]:
    machines, lines = [], [f"make report RUN={name}"] if is_collection else []
    for run in runs:
        facts, run_name = tables.read_environment(run), run.folder.name
        machine = f"{facts['cpu']}, {facts['cores']} cores, {facts.get('gpu') or 'no GPU'}"
        versions = f"{facts['python']}, {facts['torch']}"
        commit = (facts["git_commit"] or "unknown")[:10]
        machines.append([run_name, machine, versions, commit, facts["data_hash"]])
        lines += _command(run, f"<collection>/{run_name}" if is_collection else name)
    values = runs[0].settings.model_dump()
    values["data"] = "given" if values["data"] else ""
    settings = [] if is_collection else [[key, plain(value)] for key, value in values.items()]
    return dict(code="\n".join(lines), machines=machines, settings=settings)


def _command(run: Run, run_name: str) -> list[str]:
    """Return the lines of the command that makes a run."""
    settings = run.settings
    line = f"make report PROFILE={settings.profile} RUN={run_name} TARGET={settings.target}"
    line += " DATA=<dataset>" if settings.data else ""
    defaults = resolve_settings(settings.profile, settings.data or "", settings.target)
    changes = [
        f"{key}={argument(value)}"
        for key, value in settings.model_dump().items()
        if value != getattr(defaults, key)
    ]
    return [line, f'    SET="{" ".join(changes)}"'] if changes else [line]
