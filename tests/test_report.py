"""The report reads a run and nothing else: a small made-up run goes in, the words of the PDF come out."""

import csv
import json
import re
import shutil
import subprocess

import pytest
import typst

from mss_utils.config import MODELS, PROFILES, ROOT, Settings
from mss_utils.environment import dataset_kind
from mss_utils.report.collections import RULES

METRICS = ("SDR", "ISR", "SIR", "SAR", "utterance_SDR", "SI_SDR")
PAIRS = (("demucs_lstm", "unet"), ("demucs_attention", "unet"), ("demucs_attention", "demucs_lstm"))
MEDIANS = dict(mixture=-7.25, unet=5.5, demucs_lstm=4.25, demucs_attention=4.5, irm=11.75, mwf=12.5)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="160" height="70"><rect width="160" height="70" fill="#cde"/></svg>'
COMMON_FIGURES = (
    "pipeline",
    "data_levels",
    "data_together",
    "data_spectrograms",
    *(f"architecture_{model}" for model in MODELS),
)
TARGET_FIGURES = (
    "training",
    "scores",
    "slopes",
    "trade_off",
    "cost",
    "excerpt_best",
    "excerpt_median",
    "excerpt_worst",
    "phase",
    "reach",
    "repeat",
    "attack",
)
HYPOTHESES = (  # hypothesis, measure, unit
    (
        "the time domain keeps the phase",
        "SDR of the true magnitude with a model's phase, B1 − A",
        "dB",
    ),
    (
        "the time domain keeps the phase",
        "SDR of the true magnitude with a model's phase, B2 − A",
        "dB",
    ),
    ("more of A's error is phase", "share of the error that is phase, A − B1", "of 1"),
    ("B2 sees all of a segment", "gradient from beyond 0.5 s, B2 over B1", "dB of gradient"),
    ("B2 sees all of a segment", "attention at one bar over that near it", "dB of attention"),
    ("B2 sees all of a segment", "repetition gain of B2 at 1 s", "dB"),
    ("B2 is better on rhythm", "rank correlation of repetitiveness with the SDR of B2 − B1", "rho"),
    ("B2 needs more data", "gain in SDR from ten times the music, B2 − B1", "dB"),
    (
        "the time domain keeps the attack",
        "SDR in the attack minus SDR in the sustain, B1 − A",
        "dB",
    ),
    (
        "the time domain keeps the attack",
        "SDR in the attack minus SDR in the sustain, B2 − A",
        "dB",
    ),
)

needs_pdftotext = pytest.mark.skipif(
    not shutil.which("pdftotext"), reason="pdftotext (poppler-utils) is not installed"
)


class FakeRun:
    """A run folder as the report needs it, below a Typst root of its own. Tables are lists of dicts until `text` writes them."""

    def __init__(
        self,
        root,
        profile="demo",
        targets=("piano",),
        seeds=1,
        data=None,
        name="songs",
        folder="results/fake",
    ):
        self.root, self.folder, self.targets = root, root / folder, targets
        target = targets[0] if len(targets) == 1 else "all"
        settings = {
            "profile": profile,
            **PROFILES[profile],
            "target": target,
            "seeds": seeds,
            "data": data,
        }
        self.settings = Settings(**settings).model_dump(mode="json")
        self.environment = dict(
            python="3.11.9",
            torch="2.11.0",
            platform="Linux",
            cpu="some processor",
            cores=2,
            gpu=None,
            git_commit="0a1b2c3d4e",
            seeds=list(range(seeds)),
            data_hash="9f86d081",
            date="2026-02-03",
            sample_rate=self.settings["sample_rate"],
            dataset=dict(
                name=name,
                tracks=dict(train=9, valid=2, test=2),
                hours=dict(train=0.2, valid=0.04, test=0.04),
                stems=["piano", "rest"],
            ),
        )
        self.tables = dict(
            summary=[
                self._summary(t, model, metric, seeds)
                for t in targets
                for model in MEDIANS
                for metric in METRICS
            ],
            paired=[
                self._paired(t, a, b, metric, seeds)
                for t in targets
                for a, b in PAIRS
                for metric in METRICS
            ],
            tracks=[
                self._track(t, name, model)
                for t in targets
                for name in ("one", "two")
                for model in MEDIANS
            ],
            cost=[self._cost(t, model) for t in targets for model in MODELS],
            lost_frames=[
                self._lost(t, model, frames)
                for t in targets
                for model in MEDIANS
                for frames in (3, 5)
            ],
            cross_check=[
                dict(metric=metric, scores=100, largest_difference_db=3e-8, unequal_nan=0, tracks=2)
                for metric in METRICS[:4]
            ],
            ablations=[
                self._ablation(t, name, metric)
                for t in targets
                for name in ("random_mix", "curriculum")
                for metric in METRICS
            ],
            phase=[
                self._phase(t, name, model)
                for t in targets
                for name in ("one", "two")
                for model in MEDIANS
            ],
            transients=[
                self._transients(t, name, model)
                for t in targets
                for name in ("one", "two")
                for model in MEDIANS
            ],
            hypotheses=[self._hypothesis(t, *row) for t in targets for row in HYPOTHESES],
            ratings=[],
            opinion=[],
        )

    def _summary(self, target, model, metric, seeds):
        middle = MEDIANS[model]
        key = dict(
            references="stems" if len(self.targets) > 1 else "target+residual",
            target=target,
            model=model,
            metric=metric,
        )
        return key | dict(
            median=middle, mean=middle, ci_low=middle - 1, ci_high=middle + 1, tracks=2, seeds=seeds
        )

    def _paired(self, target, a, b, metric, seeds):
        key = dict(
            target=target,
            a=a,
            b=b,
            metric=metric,
            median_difference=0.25,
            ci_low=-0.5,
            ci_high=0.75,
        )
        return key | dict(p_wilcoxon=0.2, p_corrected=0.4, tracks=2, seeds=seeds)

    def _track(self, target, name, model):
        key = dict(references="target+residual", target=target, track=name, model=model, seed=0)
        return (
            key | {metric: MEDIANS[model] for metric in METRICS} | dict(frames=70, usable_frames=66)
        )

    def _lost(self, target, model, frames):
        key = dict(
            references="target+residual", target=target, track=f"lost {frames}", model=model, seed=0
        )
        return key | dict(reason=f"silent: reference of {target}", frames=frames)

    def _ablation(self, target, name, metric):
        scores = dict(
            with_it=5.5,
            without_it=4.75,
            median_difference=0.625,
            ci_low=0.125,
            ci_high=1.25,
            p_wilcoxon=0.01,
            p_corrected=0.02,
        )
        return (
            dict(target=target, model="unet", ablation=name, metric=metric)
            | scores
            | dict(tracks=2, seeds=1, steps=self.settings["steps"])
        )

    def _phase(self, target, name, model):
        key = dict(
            target=target,
            track=name,
            model=model,
            seed=0,
            band_low_hz=0.0,
            band_high_hz=self.settings["sample_rate"] / 2,
        )
        return key | dict(
            phase_error_rad=0.5,
            sdr=MEDIANS[model],
            sdr_true_phase=MEDIANS[model] + 2,
            sdr_true_magnitude=7.125,
        )

    def _transients(self, target, name, model):
        return dict(
            target=target,
            track=name,
            model=model,
            seed=0,
            attack_sdr=6.375,
            sustain_sdr=3.625,
            attack_time_error_ms=8.5,
        )

    def _hypothesis(self, target, hypothesis, measure, unit):
        key = dict(
            hypothesis=hypothesis,
            measure=f"{target}: {measure}",
            effect=0.25,
            unit=unit,
            ci_low=-0.5,
            ci_high=0.75,
        )
        return key | dict(tracks=2, seeds=1, verdict="cannot tell")

    def _cost(self, target, model):
        key = dict(
            target=target,
            model=model,
            seed=0,
            parameters=1234567,
            train_s=600.0,
            steps=self.settings["steps"],
        )
        return key | dict(audio_s_per_s=40.0, inference_rtf=0.0125, peak_memory_mb=1500.0)

    def change(self, table, where, **values):
        """Set `values` in every row of `table` that agrees with `where`."""
        rows = [
            row
            for row in self.tables[table]
            if all(row[key] == value for key, value in where.items())
        ]
        assert rows
        for row in rows:
            row.update(values)

    def write(self):
        shutil.copytree(
            ROOT / "report",
            self.root / "report",
            ignore=shutil.ignore_patterns("*.pdf", "*.html"),
            dirs_exist_ok=True,
        )
        for folder in ("tables", "figures"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        (self.folder / "environment.json").write_text(json.dumps(self.environment))
        self.tell()
        for name, rows in self.tables.items():
            write_rows(self.folder / "tables" / f"{name}.csv", rows)
        mixing = (
            ["data_mixing"]
            if len(self.targets) == 1
            else [f"data_mixing-{target}" for target in self.targets]
        )
        for name in (
            *COMMON_FIGURES,
            *mixing,
            *(f"{figure}-{target}" for figure in TARGET_FIGURES for target in self.targets),
        ):
            (self.folder / "figures" / f"{name}.svg").write_text(SVG)
        for target in self.targets:
            for model in MODELS:
                self._write_model(target, model)

    def tell(self, **more):
        """What the pipeline adds to the files of a run."""
        kind = dataset_kind(Settings(**self.settings), self.environment["dataset"])
        (self.folder / "about.json").write_text(json.dumps(dict(kind=kind) | more))

    def _write_model(self, target, model, valid_sdr=5.0):
        folder = self.folder / "models" / target / model / "seed0"
        folder.mkdir(parents=True, exist_ok=True)
        steps = self.settings["steps"]
        described = dict(
            model=model,
            target=target,
            parameters=1234567,
            steps=steps,
            best_step=steps,
            valid_sdr=valid_sdr,
            train_s=600.0,
        )
        (folder / "model.json").write_text(json.dumps(described))

    def compile(self):
        pdf = self.root / "report.pdf"
        typst.compile(
            self.root / "report" / "report.typ",
            output=pdf,
            root=self.root,
            sys_inputs={"run": "/results/fake"},
        )
        return pdf

    def text(self):
        """The words of the report, see `words_of`."""
        self.write()
        return words_of(self)


class FakeCollection:
    """Made-up runs side by side, as the report of a collection needs them: real music, built-in songs, and a study."""

    def __init__(self, root):
        self.root = root
        self.runs = {
            "musdb7": FakeRun(
                root, "musdb7", ("vocals", "drums"), name="musdb18-7", folder="runs/musdb7"
            ),
            "demo": FakeRun(root, "demo", ("piano", "drums"), folder="runs/demo"),
            "studies": FakeRun(
                root, "musdb7", ("vocals",), name="musdb18-7", folder="runs/studies"
            ),
        }
        for name in ("musdb7", "demo"):
            self.runs[name].tables["ablations"] = []
        self.runs["studies"].settings |= dict(ablations=["unet"], data_study=True)
        self.more_music = [
            dict(
                target="vocals",
                music=music,
                model=model,
                train_tracks=80,
                train_minutes=9.1,
                steps=750,
                best_step=500,
                valid_sdr=valid,
            )
            for music, valid in (("songs as they are", 4.125), ("+ random mixing", 4.75))
            for model in ("unet", "demucs_lstm")
        ]

    def write(self):
        for run in self.runs.values():
            run.tables["data_amount"] = [
                dict(
                    target=run.targets[0],
                    track=track,
                    model=model,
                    seed=0,
                    share=share,
                    SDR=4.25 + share,
                )
                for track in ("one", "two")
                for model in MODELS[1:]
                for share in (0.1, 1.0)
            ]
            run.write()
            (run.folder / "profile.json").write_text(
                Settings(profile=run.settings["profile"]).model_dump_json()
            )
            music = "MUSDB18 excerpts" if run.settings["profile"] == "musdb7" else "built-in songs"
            run.tell(music=music, study=bool(run.settings["ablations"]))
        write_rows(self.root / "runs" / "more_music.csv", self.more_music)
        shown = dict(
            training=("musdb7", "vocals"),
            phase=("musdb7", "vocals"),
            repeat=("demo", "drums"),
            attack=("demo", "piano"),
        )
        (self.root / "runs" / "rules.json").write_text(json.dumps(RULES))
        (self.root / "runs" / "remarks.txt").write_text("The machine had other work.\n")
        (self.root / "runs" / "shown.json").write_text(json.dumps(shown))
        (self.root / "runs" / "figures").mkdir(exist_ok=True)
        for name in (
            "overview",
            "pipeline",
            "architecture_unet",
            "architecture_demucs_lstm",
            *shown,
        ):
            (self.root / "runs" / "figures" / f"{name}.svg").write_text(SVG)

    def compile(self, kind="pdf"):
        path, inputs = (
            self.root / f"report.{kind}",
            dict(name="reference", runs=",".join(self.runs), format=kind),
        )
        typst.compile(
            self.root / "report" / "collection.typ",
            output=path,
            root=self.root,
            format=kind,
            sys_inputs=inputs,
        )
        return path

    def text(self):
        self.write()
        return words_of(self)


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, list(rows[0]) if rows else ["a table without rows has a header"]
        )
        writer.writeheader()
        writer.writerows(rows)


def words_of(fake):
    """The words of a written report, without any space or hyphen and on one endless page: where lines and pages break does not matter."""
    source = fake.root / "report" / "lib.typ"
    source.write_text(
        re.sub('paper: "a4"', "width: 21cm, height: 490cm", source.read_text(), count=1)
    )
    return squeezed(
        subprocess.run(
            ["pdftotext", fake.compile(), "-"], capture_output=True, text=True, check=True
        ).stdout
    )


def squeezed(text):
    return re.sub(r"[\s\u00ad\u2010-]", "", text)


def says(text, sentence):
    return squeezed(sentence) in text


@needs_pdftotext
def test_numbers_come_from_the_run(tmp_path):
    run = FakeRun(tmp_path)
    text = run.text()
    assert says(
        text,
        "5.50 dB for A, 4.25 dB for B1 and 4.50 dB for B2, against −7.25 dB for the untouched mixture and 11.75 dB",
    )
    assert says(text, "12.75 dB above the untouched mixture")
    assert (
        says(text, "make report PROFILE=demo RUN=fake TARGET=piano")
        and says(text, "0a1b2c3d4e")
        and says(text, "3 February 2026")
    )
    assert says(text, "132 had a score") and says(text, "12.5 ms/s") and says(text, "1,234,567")
    run.change("summary", dict(model="unet", metric="SDR"), median=-9.876)
    text = run.text()
    assert says(text, "−9.88 dB for A") and not says(text, "5.50 dB for A")
    assert says(text, "is that of B2, 4.50 dB")


@needs_pdftotext
def test_the_data_choose_the_sentence(tmp_path):
    run, pair = FakeRun(tmp_path), dict(a="demucs_attention", b="demucs_lstm", metric="SDR")
    undecided = "the interval does not tell B2 from B1 in SDR (+0.25 dB [−0.50, +0.75])"
    text = run.text()
    assert says(text, undecided) and says(text, "do not separate memory from attention")
    assert not says(text, "B2 is ahead of B1") and not says(text, "B1 is ahead of B2")

    run.change("paired", pair, median_difference=1.25, ci_low=0.5, ci_high=2.0, p_corrected=0.0004)
    text = run.text()
    assert says(text, "B2 is ahead of B1 in SDR by 1.25 dB [0.50, 2.00]") and not says(
        text, undecided
    )
    assert says(text, "corrected p < 0.001") and says(text, "is no evidence for it")

    run.change("paired", pair, median_difference=-1.25, ci_low=-2.0, ci_high=-0.5, p_corrected=0.06)
    text = run.text()
    assert says(
        text,
        "B1 is ahead of B2 in SDR by 1.25 dB [0.50, 2.00], although the corrected Wilcoxon test does not confirm it",
    )
    assert says(text, "it did not outweigh what it lost elsewhere")


@needs_pdftotext
def test_what_is_switched_on_is_said(tmp_path):
    run = FakeRun(tmp_path)
    assert not says(run.text(), "slower by up to") and not says(run.text(), "is the sum of")
    run.settings |= dict(groups={"other": ["synth", "fx"]}, speed_semitones=2, swap_channels=False)
    text = run.text()
    assert says(text, "The stem other is the sum of synth and fx.") and says(text, "synth+fx→other")
    assert says(text, "played higher and faster or lower and slower by up to 2 semitones")


@needs_pdftotext
def test_ablations_are_shown_or_said_not_to_have_run(tmp_path):
    run = FakeRun(tmp_path)
    text = run.text()
    assert (
        says(text, "+0.63 [+0.13, +1.25]")
        and says(text, "A was trained again without each")
        and not says(text, "Not run.")
    )
    run.tables["ablations"] = []
    text = run.text()
    assert says(text, "with --set ablations=unet; this run did not ask for it") and not says(
        text, "+0.63 [+0.13, +1.25]"
    )


@needs_pdftotext
def test_what_has_no_score_is_said_and_so_is_who_checked(tmp_path):
    run = FakeRun(tmp_path)
    text = run.text()
    assert says(
        text, "of 140 frames of A’s estimates 132 had a score; lost: 8 (silent: reference of piano)"
    )
    assert says(text, "on the two shortest test tracks museval computed 400 scores again") and says(
        text, "is below 10−7 dB"
    )
    run.change("summary", dict(model="mixture", metric="SAR"), median=254.37)
    run.change("cross_check", dict(metric="SIR"), largest_difference_db=0.25, unequal_nan=3)
    text = run.text()
    assert says(text, "> 80") and not says(text, "254.37")
    assert says(text, "is below 100 dB; 3 scores exist in one program only")
    run.tables |= dict(cross_check=[], lost_frames=[])
    assert says(run.text(), "in this run no score was computed by both")
    run.settings["scorer"] = "museval"
    assert says(run.text(), "The scores are computed by museval 0.4.1; in this run")


@needs_pdftotext
@pytest.mark.parametrize(
    "low, high, sentence",
    [
        (0.5, 2.0, "Both waveform models leave fewer artifacts"),
        (-2.0, -0.5, "Both waveform models leave more artifacts"),
        (-0.5, 0.5, "The artifacts do not decide it"),
    ],
)
def test_artifacts(tmp_path, low, high, sentence):
    run = FakeRun(tmp_path)
    run.change(
        "paired", dict(metric="SAR"), median_difference=(low + high) / 2, ci_low=low, ci_high=high
    )
    assert says(run.text(), sentence)


@needs_pdftotext
def test_verdicts_and_the_sentences_before_them_come_from_the_table(tmp_path):
    run = FakeRun(tmp_path)
    text = run.text()
    assert says(text, "allow an SDR of 7.13 dB for A, 7.13 dB for B1 and 7.13 dB for B2") and says(
        text, "8.5 ms for A"
    )
    assert says(text, "do not set the two waveform models apart from A on one and the same side")
    assert says(text, "Whether the weights of B2 gather at the bar, the data do not tell")
    for measure, values, sentence in (
        (
            "SDR of the true magnitude with a model's phase, B1 − A",
            dict(effect=1.0, ci_low=0.5, ci_high=1.5),
            "have the better phase",
        ),
        (
            "SDR of the true magnitude with a model's phase, B1 − A",
            dict(effect=-1.0, ci_low=-1.5, ci_high=-0.5),
            "have a worse phase",
        ),
        (
            "attention at one bar over that near it",
            dict(ci_low=0.1),
            "The weights of B2 gather at the bar.",
        ),
        (
            "gradient from beyond 0.5 s, B2 over B1",
            dict(ci_low=0.1),
            "Of the little that comes from far away, B2 has more",
        ),
        (
            "repetition gain of B2 at 1 s",
            dict(ci_low=0.1),
            "The clean repeat beside the damage brings B2 more",
        ),
        (
            "repetition gain of B2 at 1 s",
            dict(ci_low=-0.1, ci_high=0.1, verdict="not supported"),
            "brings B2 nothing that other music",
        ),
        (
            "SDR in the attack minus SDR in the sustain, B1 − A",
            dict(ci_low=0.1),
            "both waveform models keep attacks better than A",
        ),
        (
            "SDR in the attack minus SDR in the sustain, B1 − A",
            dict(ci_low=-0.3, ci_high=-0.1),
            "both waveform models keep attacks worse",
        ),
    ):
        assert not says(text, sentence)
        run.change("hypotheses", dict(measure=f"piano: {measure}"), **values)
        if measure.endswith("B1 − A"):
            assert not says(run.text(), sentence), "of both is said what holds for both"
            run.change(
                "hypotheses", dict(measure=f"piano: {measure.replace('B1', 'B2')}"), **values
            )
        text = run.text()
        assert says(text, sentence)


@needs_pdftotext
def test_listeners_are_counted_and_their_opinion_stands_beside_the_scores(tmp_path):
    run = FakeRun(tmp_path)
    text = run.text()
    assert says(text, "Nobody has taken it for this run yet") and not says(text, "Mean opinion")
    run.tables["ratings"] = [
        dict(listener=f"{n} ear", kept=n > 1) for n in range(5) for _ in range(5)
    ]
    run.tables["opinion"] = [
        dict(
            target="piano",
            model="unet",
            mean=81.7,
            ci_low=68.2,
            ci_high=95.1,
            listeners=3,
            excerpts=6,
            ratings=18,
        )
    ]
    text = run.text()
    assert says(text, "Five listeners took it; two are left out, because") and says(
        text, "of three listeners in the blind test"
    )
    assert says(text, "[68, 95]") and says(text, "has the mean over the others")
    run.change("opinion", dict(model="unet"), mean=33.3, ci_low="", ci_high="")
    run.tables["ratings"] = [dict(listener="1 ear", kept=True)]
    text = run.text()
    assert (
        says(text, "One listener took it.")
        and says(text, "one listener gives no interval")
        and not says(text, "[68, 95]")
        and says(text, "has the mean over all")
    )


@needs_pdftotext
def test_what_was_not_asked_is_said(tmp_path):
    run = FakeRun(tmp_path)
    run.change(
        "hypotheses", dict(unit="dB"), effect="", ci_low="", ci_high="", verdict="not askable"
    )
    text = run.text()
    assert says(text, "not askable") and says(text, "Nothing of this could be measured here")


@needs_pdftotext
@pytest.mark.parametrize("seeds", [1, 3])
def test_few_seeds_speak_of_weights(tmp_path, seeds):
    text = FakeRun(tmp_path, seeds=seeds).text()
    assert says(text, "For these trained weights") == (seeds < 3)
    assert says(text, "nothing here is a claim about architectures") == (seeds < 3)


@needs_pdftotext
def test_several_targets(tmp_path):
    run = FakeRun(tmp_path, targets=("vocals", "drums"))
    run.change("summary", dict(target="drums", model="unet", metric="SDR"), median=1.125)
    text = run.text()
    assert (
        says(text, "6.1 Vocals")
        and says(text, "6.2 Drums")
        and says(text, "The references are the stems themselves")
    )
    assert says(text, "1.13 dB for A") and says(text, "5.50 dB for A") and says(text, "TARGET=all")


@needs_pdftotext
@pytest.mark.parametrize("cell", ["nan", "", "inf", "-inf"])
def test_cells_without_a_number(tmp_path, cell):
    run = FakeRun(tmp_path)
    run.change("summary", dict(model="mixture"), median=cell, ci_low=cell, ci_high=cell)
    run.change(
        "paired",
        dict(metric="SDR", a="demucs_lstm"),
        median_difference=cell,
        ci_low=cell,
        ci_high=cell,
        p_corrected=cell,
    )
    run.change("tracks", dict(model="demucs_lstm"), SDR=cell)
    text = run.text()
    mixture = "> 80 dB" if cell == "inf" else "–"
    assert says(text, f"against {mixture} for the untouched mixture") and says(
        text, "B1 and A could not be compared in SDR"
    )
    assert says(text, "0 of 0")


def test_a_validation_score_without_a_number(tmp_path):
    run = FakeRun(tmp_path)
    run.write()
    run._write_model(
        "piano", "unet", valid_sdr=float("nan")
    )  # Python writes NaN, which JSON does not know
    run._write_model("piano", "demucs_lstm", valid_sdr=float("-inf"))
    run.compile()


@needs_pdftotext
def test_each_dataset_in_its_own_words(tmp_path):
    texts = {
        "songs": FakeRun(tmp_path / "a").text(),
        "excerpts": FakeRun(
            tmp_path / "b", profile="musdb7", targets=("vocals",), name="MUSDB18-7"
        ).text(),
        "musdb": FakeRun(
            tmp_path / "c", profile="musdb18", targets=("vocals",), name="musdb18hq"
        ).text(),
        "own": FakeRun(tmp_path / "d", data="/somewhere/private/garage", name="garage").text(),
    }
    sentences = {
        "songs": "composed and played by a program",
        "excerpts": "freely available seven-second excerpts",
        "musdb": "We use the whole songs",
        "own": "our own folder, “garage”",
    }
    for kind, sentence in sentences.items():
        assert [name for name, text in texts.items() if says(text, sentence)] == [kind]
    assert says(texts["own"], "DATA=<dataset folder>") and "private" not in texts["own"]


def test_a_missing_figure_is_an_error(tmp_path):
    run = FakeRun(tmp_path)
    run.write()
    (run.folder / "figures" / "scores-piano.svg").unlink()
    with pytest.raises(typst.TypstError, match="not found"):
        run.compile()


@pytest.mark.parametrize("source", ["report.typ", "collection.typ", "lib.typ"])
def test_no_outcome_is_typed_in(source):
    lines = (ROOT / "report" / source).read_text().splitlines()
    prose = "\n".join(line for line in lines if not line.lstrip().startswith("//"))
    assert not re.search(r"\d\.\d+[\s~]*dB", prose)


# --- the report of a collection ---------------------------------------------------------------------------------------


@needs_pdftotext
def test_the_numbers_of_a_collection_come_from_its_runs(tmp_path):
    fake = FakeCollection(tmp_path)
    text = fake.text()
    assert says(
        text,
        "is 5.50 dB for vocals of the MUSDB18 excerpts (A; mixture −7.25 dB, ideal ratio mask 11.75 dB)",
    )
    assert says(text, "5.50 dB for drums of the built-in songs (A;")
    assert says(
        text,
        "the waveform models are not told apart on all eight; B1 and B2 are not told apart on all four",
    )
    assert says(
        text, "takes 4,000 (MUSDB18 excerpts) and 1,350 (built-in songs) steps with batches of 4"
    )
    assert says(text, "Demucs v2 (64 channels)") and says(text, "6.83")  # as in published.csv
    assert says(text, "Remarks of whoever made the runs: The machine had other work.")
    assert (
        says(text, "random mixing brings A +0.63 dB [+0.13, +1.25]")
        and says(text, "+ random mixing")
        and says(text, "4.75 dB")
    )
    for run in ("musdb7", "demo"):
        fake.runs[run].change(
            "summary", dict(target="drums", model="demucs_lstm", metric="SDR"), median=6.789
        )
        for target in fake.runs[run].targets:
            for model in MODELS[1:]:
                values = dict(median_difference=-1.5, ci_low=-2.25, ci_high=-0.75)
                fake.runs[run].change(
                    "paired", dict(target=target, a=model, b="unet", metric="SDR"), **values
                )
    pair = dict(a="demucs_attention", b="demucs_lstm", metric="SDR")
    fake.runs["musdb7"].change(
        "paired", dict(target="vocals") | pair, median_difference=-1.25, ci_low=-2.0, ci_high=-0.5
    )
    fake.runs["demo"].change(
        "paired", dict(target="drums") | pair, median_difference=0.05, ci_low=0.01, ci_high=0.09
    )
    fake.runs["studies"].change(
        "ablations",
        dict(ablation="random_mix", metric="SDR"),
        median_difference=-0.375,
        ci_low=-0.5,
        ci_high=-0.25,
    )
    fake.more_music[-1]["valid_sdr"] = 3.21
    text = fake.text()
    assert says(text, "6.79 dB for drums of the MUSDB18 excerpts (B1;") and says(
        text, "B1 is ahead of B2 in SDR by 1.25 dB [0.50, 2.00]"
    )
    standing = "B1 is ahead of B2 on one of four, B1 and B2 differ by less than 0.2 dB on one of four and B1 and B2 are not told apart on two of four"
    assert says(text, "The mask is ahead of both waveform models everywhere; " + standing)
    assert says(text, "worth more than the freedom of the waveform")
    assert says(text, "random mixing brings A −0.38 dB [−0.50, −0.25]") and says(text, "3.21 dB")


@needs_pdftotext
def test_the_questions_of_a_collection_are_answered_by_its_tables(tmp_path):
    fake = FakeCollection(tmp_path)
    text = fake.text()
    assert says(text, "So the answer hangs on what is separated from what") and says(
        text, "With fewer than three seeds nothing can be supported"
    )
    assert says(text, "the data do not tell everywhere") and says(
        text, "which has the better phase depends on the music"
    )
    for run in fake.runs.values():
        for row in run.tables["hypotheses"]:
            if "true magnitude" in row["measure"] or "in the attack minus" in row["measure"]:
                row.update(effect=-0.875, ci_low=-1.125, ci_high=-0.625, verdict="not supported")
    text = fake.text()
    assert (
        says(text, "For all four: both waveform models have a worse phase than A")
        and says(text, "further from the truth than the mask’s")
        and says(text, "is not yet to have a better one")
    )
    assert says(text, "both waveform models keep attacks worse than A") and says(
        text, "−0.88 [−1.13, −0.63] ✗"
    )
    for row in fake.runs["demo"].tables["hypotheses"]:
        if "repetition gain of B2" in row["measure"] or (
            row["measure"].startswith("piano") and "in the attack minus" in row["measure"]
        ):
            row.update(effect=0.875, ci_low=0.625, ci_high=1.125, verdict="cannot tell")
    text = fake.text()
    assert says(
        text, "Of four repetition gains of B2, one a target and lag, two lie above zero"
    ) and says(text, "not seen to in others")
    assert says(
        text,
        "Piano: compared with how they do in the sustain, both waveform models keep attacks better than A",
    )
    assert says(text, "Vocals, drums (MUSDB18 excerpts) and drums (built-in songs): compared with")
    for run in fake.runs.values():
        run.tables["hypotheses"] = [
            row for row in run.tables["hypotheses"] if "dB of" in row["unit"]
        ]
    text = fake.text()
    assert says(text, "For all four: the phases could not be compared.") and says(
        text, "For all four: attacks could not be compared."
    )
    assert says(text, "No lag could be asked of these models.") and says(
        text,
        "phases could not be compared; whether B2 uses a repeat could not be asked; attacks could",
    )


def test_a_collection_is_one_page_of_html_too(tmp_path):
    fake = FakeCollection(tmp_path)
    fake.write()
    page = fake.compile("html").read_text()
    assert (
        page.count('<div id="players"></div>') == 1
        and page.count("<math") > 20
        and page.count("<figure") > 12
    )
    assert "5.50" in page and not re.search(r'(src|href)="(?!data:|#|https://doi)', page), (
        "nothing is fetched"
    )
