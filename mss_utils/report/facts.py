"""Facts of a report: numbers as text, tables and sentences, computed from the tables of the runs.

    results/<run>/{tables,models}, settings.json, environment.json --> facts.json --> report.typ

Typst only lays out. One run and a collection of runs have facts of the same form: a *part* is one
target of one run, and every table of results has a row or a column per part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mss_utils.analysis.attack import APART_S, ATTACK_S
from mss_utils.analysis.hypotheses import NEGLIGIBLE_DB
from mss_utils.analysis.repetition import BURST_DB
from mss_utils.config import MODEL_LETTERS, MODELS, SPLITS, WAVEFORM_MODELS, Run, resolve_settings
from mss_utils.environment import dataset_kind
from mss_utils.evaluation.statistics import MIN_SEEDS, PAIRS, detectable_difference
from mss_utils.figures import LABELS, format_number
from mss_utils.report.tables import evaluated_targets, read_json, read_model_json, read_table
from mss_utils.report.wording import interval, join, plain, quantity, seconds, spell

SCORE_METRICS = ("SDR", "SIR", "SAR", "utterance_SDR")
MUSIC = dict(songs="built-in songs", excerpts="MUSDB18 excerpts", musdb="MUSDB18")
ABLATION_NAMES = dict(random_mix="random mixing", curriculum="the curriculum")
VERDICT_MARKS = {"supported": "✓", "not supported": "✗", "cannot tell": "?"}


@dataclass(frozen=True)
class RunData:
    """One run with the files that a report reads."""

    run: Run

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Content of environment.json."""
        return read_json(self.run.folder / "environment.json")

    @property
    def kind(self) -> str:
        """songs, excerpts, musdb or own."""
        return dataset_kind(self.run.settings, self.environment["dataset"])

    @property
    def is_study(self) -> bool:
        """Whether the run was made for ablations or the amount of data: not part of the results."""
        return bool(self.run.settings.ablations) or self.run.settings.data_study

    @property
    def music(self) -> str:
        """Name of the dataset."""
        return MUSIC.get(self.kind) or str(self.environment["dataset"]["name"])


@dataclass(frozen=True)
class Part:
    """One target of one run; `label` names it in the report."""

    data: RunData
    target: str
    label: str

    def rows(self, table: str) -> pd.DataFrame:
        """Return the rows of a table about this target."""
        rows = read_table(self.data.run, table)
        return rows[rows["target"] == self.target]

    def median(self, model: str, metric: str = "SDR") -> float:
        """Return the median score of a model."""
        rows = self.rows("summary").set_index(["model", "metric"])
        return float(rows["median"].get((model, metric), np.nan))

    def paired(self, a: str, b: str, metric: str = "SDR") -> dict[str, Any] | None:
        """Return the paired difference a - b."""
        rows = self.rows("paired").query("a == @a and b == @b and metric == @metric")
        return rows.iloc[0].to_dict() if len(rows) else None

    def hypotheses(self, prefix: str) -> list[dict[str, Any]]:
        """Return the measured hypotheses whose id begins with `prefix`."""
        rows = self.rows("hypotheses").dropna(subset="effect")
        return rows[rows["id"].str.startswith(prefix)].to_dict("records")

    @property
    def best(self) -> str:
        """Trained model with the highest median SDR."""
        return max(MODELS, key=lambda model: np.nan_to_num(self.median(model), nan=-np.inf))


def collect_facts(runs: Iterable[Run], name: str, is_collection: bool) -> dict[str, Any]:
    """Return the facts of a report on one run, or on the runs of a collection."""
    every = [RunData(run) for run in runs]
    shown = [data for data in every if not data.is_study] or every
    pairs = [(data, target) for data in shown for target in evaluated_targets(data.run)]
    targets = [target for _, target in pairs]
    parts = []
    for data, target in pairs:
        label = f"{target} ({data.music})" if targets.count(target) > 1 else target
        parts.append(Part(data, target, label))
    n_seeds = int(min(read_table(data.run, "paired")["seeds"].min() for data in shown))
    dates = sorted(data.environment["date"] for data in shown)
    rules = dict(negligible_db=plain(NEGLIGIBLE_DB), min_seeds=spell(MIN_SEEDS))
    rules |= dict(burst_db=plain(-BURST_DB), apart_ms=plain(1000 * APART_S))
    rules |= dict(attack_ms=plain(1000 * ATTACK_S))
    return dict(
        name=name,
        is_collection=is_collection,
        date=f"{date.fromisoformat(dates[-1]):%-d %B %Y}",
        few_seeds=n_seeds < MIN_SEEDS,
        seeds=quantity(n_seeds, "training"),
        parts=[dict(target=part.target, label=part.label) for part in parts],
        rules=rules,
        data=_data_facts(shown),
        method=_method_facts(shown),
        training=_training_facts(parts),
        scores=_score_facts(parts, every),
        questions=_question_facts(parts),
        studies=_study_facts(every),
        listening=_listening_facts(parts),
        reproduce=_reproduce_facts(every, name, is_collection),
    )


# --- data and method ------------------------------------------------------------------------------


def _same_or_each(shown: list[RunData], texts: Iterable[str]) -> str:
    """Return the text that all runs share, or the text of each with its dataset."""
    by_run = list(texts)
    if len(set(by_run)) == 1:
        return by_run[0]
    return join(f"{text} ({data.music})" for text, data in zip(by_run, shown, strict=True))


def _data_facts(shown: list[RunData]) -> dict[str, Any]:
    rows = []
    for data in shown:
        row = [data.music, join(evaluated_targets(data.run))]
        for split in SPLITS:
            tracks, hours = (data.environment["dataset"][key][split] for key in ("tracks", "hours"))
            row.append(f"{quantity(tracks, 'track', spelled=False)}, {seconds(3600 * hours)}")
        rows.append(row)
    rates = sorted({data.environment["sample_rate"] for data in shown})
    return dict(
        kinds=list(dict.fromkeys(data.kind for data in shown)),
        stems={data.kind: join(data.environment["dataset"]["stems"]) for data in shown},
        own_name=next((data.music for data in shown if data.kind == "own"), ""),
        rates=join(f"{plain(rate / 1000)} kHz" for rate in rates),
        half_rates=join(f"{plain(rate / 2000)} kHz" for rate in rates),
        stereo=any(data.run.settings.channels == 2 for data in shown),
        table=dict(head=["Data", "Targets", "Training", "Validation", "Test"], rows=rows),
    )


def _method_facts(shown: list[RunData]) -> dict[str, Any]:
    first, every = shown[0], [data.run.settings for data in shown]
    settings, rate = every[0], first.environment["sample_rate"]
    strides = settings.demucs_strides
    width = min(settings.demucs_channels * 2 ** (len(strides) - 1), settings.demucs_max_channels)
    speeds = sorted({one.speed_semitones for one in every} - {0})
    texts = {}
    for key in type(settings).model_fields:
        texts[key] = _same_or_each(shown, (plain(getattr(one, key)) for one in every))
    for key in ("coherent_share", "silent_share"):
        shares = (f"{plain(100 * getattr(one, key))} %" for one in every)
        texts[key] = _same_or_each(shown, shares)
    target = evaluated_targets(first.run)[0]
    models = {model: read_model_json(first.run, target, model) for model in MODELS}
    return dict(
        settings=texts,
        random_mix=any(one.random_mix for one in every),
        curriculum=any(one.curriculum for one in every),
        flip_polarity=any(one.flip_polarity for one in every),
        speed=join(f"{semitones} semitones" for semitones in speeds),
        window_ms=_same_or_each(shown, (f"{1000 * one.n_fft / rate:.0f} ms" for one in every)),
        filters_ms=plain(round(4000 * strides[0] / rate, 1)) + " ms",
        taps_ms=plain(round(512_000 / rate, 1)) + " ms",
        n_filters=plain(settings.demucs_channels),
        n_taps=plain(4 * strides[0]),
        strides=join(map(str, strides[1:])),
        width=plain(width),
        frame_rate=f"{rate / np.prod(strides):.1f}",
        parameters={model: f"{values['parameters']:,}" for model, values in models.items()},
    )


def _training_facts(parts: list[Part]) -> dict[str, Any]:
    rows, at_end, early = [], [], []
    for part in parts:
        cost = part.rows("cost").groupby("model")[["inference_rtf", "peak_memory_mb"]].mean()
        for model in MODELS:
            training = read_model_json(part.data.run, part.target, model)
            step, n_steps = training["best_step"], training["steps"]
            name = f"{MODEL_LETTERS[model]} on {part.label}"
            if step == n_steps:
                at_end.append(name)
            elif step <= n_steps / 2:
                early.append(name)
            target = part.label if model == MODELS[0] else ""
            weights, score = f"{training['parameters']:,}", format_number(training["valid_sdr"])
            speed = f"{1000 * cost.loc[model, 'inference_rtf']:.1f} ms/s"
            memory = f"{cost.loc[model, 'peak_memory_mb']:.0f} MB"
            row = [target, LABELS[model], weights, f"{step} of {n_steps}", f"{score} dB"]
            rows.append([*row, seconds(training["train_s"]), speed, memory])
    head = ["Target", "Model", "Parameters", "Best step", "Valid. SDR", "Training", "Inference"]
    sentences = ["No training had its best validation score at the last step."]
    if at_end:
        sentences = [
            f"{quantity(len(at_end), 'training').capitalize()} of {len(rows)} had the best "
            f"validation score at the last step ({join(at_end)}): more steps may improve them."
        ]
    if early:
        sentences.append(
            f"The best step of {join(early)} is in the first half of the training: the rest is "
            "overfitting, and the best weights are kept."
        )
    return dict(table=dict(head=[*head, "Memory"], rows=rows), sentences=sentences)


# --- scores ---------------------------------------------------------------------------------------


def _comparison(part: Part, a: str, b: str) -> str:
    """Return the outcome of a paired comparison in SDR as a clause."""
    row, (first, second) = part.paired(a, b), (MODEL_LETTERS[a], MODEL_LETTERS[b])
    if row is None or np.isnan([row["ci_low"], row["ci_high"]]).any():
        return f"{first} and {second} could not be compared"
    low, high, difference = row["ci_low"], row["ci_high"], row["median_difference"]
    if low <= 0 <= high:
        size = f"{format_number(difference, sign='+')} dB {interval(low, high, sign='+')}"
        return f"no difference found between {first} and {second} ({size})"
    if high < 0:
        first, second, low, high = second, first, -high, -low
    doubt = "" if row["p_corrected"] < 0.05 else ", although the corrected test does not confirm it"
    size = f"{format_number(abs(difference))} dB {interval(low, high)}"
    return f"{first} is ahead of {second} by {size}{doubt}"


def _side(row: dict[str, Any]) -> str:
    """Return where an interval is: above zero, below zero, or open."""
    if row["ci_low"] > 0:
        return "above"
    return "below" if row["ci_high"] < 0 else "open"


def _standing(part: Part, a: str, b: str) -> str:
    """Return the side of a - b in SDR, near (within the negligible range), or none."""
    row = part.paired(a, b)
    if row is None or np.isnan([row["ci_low"], row["ci_high"]]).any():
        return "none"
    is_near = max(abs(row["ci_low"]), abs(row["ci_high"])) <= NEGLIGIBLE_DB
    return "near" if is_near else _side(row)


def _score_facts(parts: list[Part], every: list[RunData]) -> dict[str, Any]:
    abstract, comparisons, gaps = [], [], []
    for part in parts:
        best, mixture, mask = part.best, part.median("mixture"), part.median("irm")
        abstract.append(
            f"{format_number(part.median(best))} dB for {part.target} of the {part.data.music} "
            f"({MODEL_LETTERS[best]}; mixture {format_number(mixture)} dB, ideal ratio mask "
            f"{format_number(mask)} dB)"
        )
        clauses = "; ".join(_comparison(part, a, b) for a, b in PAIRS)
        comparisons.append([part.label, f"{clauses}."])
        gap = mask - part.median("unet")
        side = "above" if gap > 0 else "below"
        gaps.append(f"{format_number(abs(gap))} dB {side} A for {part.label}")
    return dict(
        abstract=join(abstract, "; "),
        comparisons=comparisons,
        mask_gap=f"The ideal ratio mask is {join(gaps)}.",
        cross_check=_cross_check_sentence(every),
        lost_frames=_lost_frames_sentence(parts),
        tables=[_score_table(part) for part in parts],
        paired=[_paired_table(part) for part in parts],
    )


def _score_table(part: Part) -> dict[str, Any]:
    summary = part.rows("summary").set_index(["model", "metric"])
    rows = []
    for model in part.rows("summary")["model"].unique():
        cells = []
        for metric in SCORE_METRICS:
            row = summary.loc[(model, metric)]
            if (model, metric) == ("mixture", "SAR") or np.isnan(row["median"]):
                cells.append(["–", ""])  # nothing was processed: no artifacts
            else:
                text = interval(row["ci_low"], row["ci_high"], digits=1)
                cells.append([format_number(row["median"]), text])
        mean = format_number(summary.loc[(model, "SDR"), "mean"])
        rows.append(dict(label=LABELS[model], best=model == part.best, cells=[*cells, [mean, ""]]))
    n_tracks = quantity(int(summary["tracks"].max()), "track", spelled=False)
    return dict(title=f"{part.target}, {part.data.music}, {n_tracks}", rows=rows)


def _paired_table(part: Part) -> dict[str, Any]:
    scores = part.rows("tracks").groupby(["model", "track"])[list(SCORE_METRICS)].mean()
    rows = []
    for a, b in PAIRS:
        for metric in SCORE_METRICS:
            row = part.paired(a, b, metric)
            if row is None:
                continue
            differences = (scores.loc[a, metric] - scores.loc[b, metric]).dropna()
            name = f"{MODEL_LETTERS[a]} − {MODEL_LETTERS[b]}" if metric == SCORE_METRICS[0] else ""
            median = format_number(row["median_difference"], sign="+")
            bounds = interval(row["ci_low"], row["ci_high"], sign="+")
            detectable = format_number(detectable_difference(row))
            p_value = "–" if np.isnan(row["p_corrected"]) else f"{row['p_corrected']:.2g}"
            ahead = f"{(differences > 0).sum()} of {len(differences)}"
            label = metric.replace("_", " ")
            rows.append([name, label, median, bounds, detectable, p_value, ahead])
    head = ["Difference", "Metric", "Median, dB", "95 % interval", "Detectable", "Corrected p"]
    return dict(label=part.label, head=[*head, "Tracks ahead"], rows=rows)


def _cross_check_sentence(every: list[RunData]) -> str:
    checked = pd.concat([read_table(data.run, "cross_check") for data in every])
    n_scores = int(checked["scores"].sum())
    if not n_scores:
        return "No score was cross-checked."
    largest = checked["largest_difference_db"].max()
    bound = f"below 1e{int(np.floor(np.log10(largest))) + 1} dB" if largest > 0 else "zero"
    return (
        f"Our program computes them; museval 0.4.1 computed {n_scores:,} of them again, and the "
        f"largest difference is {bound}."
    )


def _lost_frames_sentence(parts: list[Part]) -> str:
    tracks = pd.concat([part.rows("tracks") for part in parts])
    rows = tracks[(tracks["model"] == "unet") & (tracks["seed"] == 0)]
    usable, frames = int(rows["usable_frames"].sum()), int(rows["frames"].sum())
    return f"{usable:,} of {frames:,} frames of A's estimates have a score."


# --- the three questions --------------------------------------------------------------------------


def _sides(parts: list[Part], prefix: str) -> list[str]:
    """Return where the effects of B1 and B2 are."""
    return [_side(row) for part in parts for row in part.hypotheses(prefix)]


def _outcomes(parts: list[Part], prefix: str, both: str, unclear: str) -> list[list[str]]:
    """Return [labels of the parts, sentence] per sentence; `both` has {} for better or worse."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        sides = set(_sides([part], prefix))
        sentence = unclear if sides else "This could not be measured."
        if sides == {"above"}:
            sentence = both.format("better")
        elif sides == {"below"}:
            sentence = both.format("worse")
        groups.setdefault(sentence, []).append(part.label)
    return [[join(labels), sentence] for sentence, labels in groups.items()]


def _question_facts(parts: list[Part]) -> dict[str, Any]:
    gains = [row for part in parts for row in part.hypotheses("repetition_gain_b2_")]
    own = [row for row in gains if "minus" not in row["id"]]
    return dict(
        answer=_answer(parts, own),
        phase_scores=[[part.label, _phase_scores(part)] for part in parts],
        phase=_outcomes(
            parts,
            "phase_true_magnitude",
            "Both waveform models have a {} phase than A.",
            "The phase does not separate both waveform models from A on one side.",
        ),
        repetition=_repetition_sentence(own, gains),
        attack_scores=[[part.label, _attack_scores(part)] for part in parts],
        attack=_outcomes(
            parts,
            "attack_minus_sustain",
            "Relative to the sustain, both waveform models keep attacks {} than A.",
            "Attacks do not separate both waveform models from A on one side.",
        ),
        table=_hypothesis_table(parts),
    )


def _medians(rows: pd.DataFrame, column: str, unit: str, digits: int = 2, sign: str = "") -> str:
    medians = rows.replace([np.inf, -np.inf], np.nan).groupby("model")[column].median()
    return join(
        f"{format_number(medians.get(model, np.nan), digits, sign)} {unit} for "
        f"{MODEL_LETTERS.get(model, LABELS[model])}"
        for model in MODELS
    )


def _phase_scores(part: Part) -> str:
    rows = part.rows("phase")
    whole = rows[(rows["band_low_hz"] == 0) & (rows["band_high_hz"] == rows["band_high_hz"].max())]
    own = _medians(whole, "sdr_true_magnitude", "dB")
    error = _medians(whole, "phase_error_rad", "rad")
    return f"with the true magnitude, SDR {own}; mean phase error {error}."


def _attack_scores(part: Part) -> str:
    rows = part.rows("attack")
    attack, sustain = _medians(rows, "attack_sdr", "dB"), _medians(rows, "sustain_sdr", "dB")
    late = _medians(rows, "attack_time_error_ms", "ms", 1, "+")
    return f"SDR in the attack {attack}; in the sustain {sustain}; attack time error {late}."


def _repetition_sentence(own: list[dict], gains: list[dict]) -> str:
    if not own:
        return "No lag could be asked: training segments are too short."
    above = sum(row["ci_low"] > 0 for row in own)
    nothing = sum(row["verdict"] == "not supported" for row in own)
    more = [row for row in gains if "minus" in row["id"]]
    ahead = sum(row["ci_low"] > 0 for row in more)
    sentence = (
        f"Of {quantity(len(own), 'repetition gain')} of B2 (one per target and lag), "
        f"{spell(above)} above zero and {spell(nothing)} not supported; of "
        f"{quantity(len(more), 'difference')} from B1, {spell(ahead)} above zero."
    )
    if nothing == len(own):
        return f"{sentence} B2 does not use an exact repeat more than other music."
    if above == len(own):
        return f"{sentence} B2 uses an exact repeat."
    return sentence


def _count_outcomes(kinds: list[str], **texts: str) -> str:
    """Return `B2 is ahead in two of four cases and ...`; `texts` has a clause per kind."""
    clauses = []
    for kind, text in texts.items():
        if count := kinds.count(kind):
            share = f" in {spell(count)} of {spell(len(kinds))} cases" if len(kinds) > 1 else ""
            clauses.append(f"{text}{share}")
    return join(clauses)


def _answer(parts: list[Part], repetition: list[dict]) -> str:
    versus_mask = _count_outcomes(
        [_standing(part, model, "unet") for part in parts for model in WAVEFORM_MODELS],
        above="a waveform model is ahead of A",
        below="a waveform model is behind A",
        near=f"the difference is within ±{plain(NEGLIGIBLE_DB)} dB",
        open="no difference is found",
        none="no comparison is possible",
    )
    attention = _count_outcomes(
        [_standing(part, "demucs_attention", "demucs_lstm") for part in parts],
        above="B2 is ahead of B1",
        below="B1 is ahead of B2",
        near=f"B1 and B2 differ by less than {plain(NEGLIGIBLE_DB)} dB",
        open="no difference between B1 and B2 is found",
        none="B1 and B2 could not be compared",
    )
    phase = _count_outcomes(
        _sides(parts, "phase_true_magnitude"),
        above="the phase is better than A's",
        below="the phase is worse than A's",
        open="no difference in phase is found",
    )
    attack = _count_outcomes(
        _sides(parts, "attack_minus_sustain"),
        above="attacks are kept better than by A",
        below="attacks are kept worse than by A",
        open="no difference in attacks is found",
    )
    helped = spell(sum(row["ci_low"] > 0 for row in repetition))
    repeat = f"an exact repeat helps B2 in {helped} of {spell(len(repetition))} cases"
    experiments = "; ".join(filter(None, (phase, repeat if repetition else "", attack)))
    sentence = f"In SDR, {versus_mask}; {attention}."
    return f"{sentence} Three experiments: {experiments}." if experiments else sentence


def _hypothesis_table(parts: list[Part]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for index, part in enumerate(parts):
        for row in part.rows("hypotheses").to_dict("records"):
            measure = f"{row['measure']}, {row['unit']}"
            empty = [["–", "", ""] for _ in parts]
            new = dict(hypothesis=row["hypothesis"], measure=measure, cells=empty)
            cells = rows.setdefault(row["id"], new)["cells"]
            effect, verdict = format_number(row["effect"], sign="+"), row["verdict"]
            if np.isnan(row["effect"]):
                cells[index] = [effect, "", verdict]
            else:
                bounds = interval(row["ci_low"], row["ci_high"], sign="+")
                cells[index] = [effect, bounds, VERDICT_MARKS.get(verdict, verdict)]
    groups: dict[str, dict[str, Any]] = {}
    for row in rows.values():
        title = row["hypothesis"]
        groups.setdefault(title, dict(title=title, rows=[]))["rows"].append(row)
    head = ["Measure", *(part.label for part in parts)]
    return dict(head=head, groups=list(groups.values()))


# --- studies, listening, reproduction -------------------------------------------------------------


def _study_facts(every: list[RunData]) -> dict[str, Any]:
    ablations, amounts = [], []
    for data in every:
        steps = f"{data.music}, {data.run.settings.steps} steps"
        rows = read_table(data.run, "ablations")
        for row in rows[rows["metric"] == "SDR"].to_dict("records"):
            scores = [format_number(row[key]) for key in ("with_it", "without_it")]
            difference = format_number(row["median_difference"], sign="+")
            bounds = interval(row["ci_low"], row["ci_high"], sign="+")
            left_out = [MODEL_LETTERS[row["model"]], ABLATION_NAMES[row["ablation"]]]
            where = f"{row['target']} ({steps})"
            ablations.append([where, *left_out, *scores, f"{difference} {bounds}"])
        amount = read_table(data.run, "data_amount")
        medians = amount.groupby(["target", "model", "share"])["SDR"].median()
        for (target, model), values in medians.groupby(["target", "model"]):
            shares = values.droplevel(["target", "model"]).items()
            texts = (f"{format_number(sdr)} dB with {plain(100 * part)} %" for part, sdr in shares)
            amounts.append([f"{target} ({steps})", f"{MODEL_LETTERS[model]}: {join(texts)}."])
    head = ["Data", "Model", "Left out", "With it", "Without it", "Difference in SDR, dB"]
    return dict(ablations=dict(head=head, rows=ablations), data_amount=amounts)


def _listening_facts(parts: list[Part]) -> dict[str, Any]:
    runs = {part.data.run.name: part.data.run for part in parts}
    ratings = pd.concat([read_table(run, "ratings") for run in runs.values()])
    kept = ratings[ratings["kept"].astype(str) == "True"]["listener"].nunique()
    listeners = ratings["listener"].nunique()
    sentence = "Nobody has taken the blind test yet."
    if listeners:
        sentence = f"{quantity(listeners, 'listener').capitalize()} took the blind test"
        excluded = listeners - kept
        sentence += f"; {quantity(excluded, 'listener')} excluded." if excluded else "."
    rows = []
    for part in parts:
        for row in part.rows("opinion").to_dict("records"):
            bounds = interval(row["ci_low"], row["ci_high"], digits=0)
            sdr = format_number(part.median(row["model"]))
            name = LABELS.get(row["model"], row["model"])
            rows.append([part.label, name, f"{row['mean']:.0f}", bounds, sdr])
    head = ["Target", "Version", "Mean opinion", "95 % interval", "Median SDR, dB"]
    return dict(sentence=sentence, table=dict(head=head, rows=rows))


def _reproduce_facts(every: list[RunData], name: str, is_collection: bool) -> dict[str, Any]:
    machines, lines = [], [f"make report RUN={name}"] if is_collection else []
    for data in every:
        facts, run_name = data.environment, data.run.folder.name
        machine = f"{facts['cpu']}, {facts['cores']} cores, {facts.get('gpu') or 'no GPU'}"
        versions = f"{facts['python']}, {facts['torch']}"
        commit = (facts["git_commit"] or "unknown")[:10]
        machines.append([run_name, machine, versions, commit, facts["data_hash"]])
        lines += _command(data, f"<collection>/{run_name}" if is_collection else name)
    values = every[0].run.settings.model_dump()
    values["data"] = "given" if values["data"] else ""
    settings = [] if is_collection else [[key, plain(value)] for key, value in values.items()]
    head = ["Run", "Machine", "Python, PyTorch", "Commit", "Data hash"]
    return dict(code="\n".join(lines), table=dict(head=head, rows=machines), settings=settings)


def _command(data: RunData, run_name: str) -> list[str]:
    settings = data.run.settings
    line = f"make report PROFILE={settings.profile} RUN={run_name} TARGET={settings.target}"
    line += " DATA=<dataset>" if settings.data else ""
    defaults = resolve_settings(settings.profile).model_dump()
    changes = []
    for key, value in settings.model_dump().items():
        if value != defaults[key] and key not in ("profile", "data", "target"):
            text = str(value)
            if isinstance(value, (list, tuple)):
                text = ",".join(map(str, value))
            elif isinstance(value, dict):
                text = ",".join(f"{'+'.join(stems)}->{group}" for group, stems in value.items())
            changes.append(f"{key}={text}")
    return [line, f'    SET="{" ".join(changes)}"'] if changes else [line]


def dump_facts(facts: dict[str, Any]) -> str:
    """Return the facts as JSON text."""
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
