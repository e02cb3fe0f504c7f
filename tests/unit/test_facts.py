import json
import shutil

import numpy as np
import pandas as pd
import pytest

from mss_utils.config import ROOT, collection_runs
from mss_utils.report.facts import collect_facts
from mss_utils.report.wording import interval, join, seconds


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The runs of a copy of the committed collection."""
    root = tmp_path_factory.mktemp("results")
    ignore = shutil.ignore_patterns("*.safetensors", "*.html", "notebooks")
    shutil.copytree(ROOT / "results" / "reference", root / "reference", ignore=ignore)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(root))
        yield {run.folder.name: run for run in collection_runs("reference")}


@pytest.fixture
def change(reference):
    """Facts of the musdb7 run after a change of rows of one of its tables."""

    def facts_with(table, where, **values):
        path = reference["musdb7"].table(table)
        content, rows = path.read_bytes(), pd.read_csv(path)
        selected = (rows[list(where)] == pd.Series(where)).all(axis=1)
        assert selected.any()
        rows.loc[selected, list(values)] = list(values.values())
        rows.to_csv(path, index=False)
        facts = collect_facts([reference["musdb7"]], "musdb7", is_collection=False)
        path.write_bytes(content)
        return facts

    return facts_with


def test_wording():
    assert join(["a", "b", "c"]) == "a, b and c"
    assert interval(dict(ci_low=-0.5, ci_high=0.25), sign="+") == "[−0.50, +0.25]"
    assert interval(dict(ci_low=np.nan, ci_high=1)) == ""
    assert [seconds(value) for value in (59, 600, 9000)] == ["59 s", "10.0 min", "2.5 h"]


def test_facts_have_one_part_per_run_and_target(reference):
    facts = collect_facts(list(reference.values()), "reference", is_collection=True)
    labels = [part["label"] for part in facts["parts"]]
    expected = ["drums (MUSDB18 excerpts)", "drums (built-in songs)", "piano", "vocals"]
    assert sorted(labels) == expected
    assert len(facts["scores"]["tables"]) == 4 and facts["few_seeds"]
    assert "NaN" not in json.dumps(facts)


def test_changed_score_changes_the_table(change):
    facts = change("summary", dict(target="vocals", model="unet", metric="SDR"), median=9.87)
    table = facts["scores"]["tables"][0]
    cells = {row["model"]: row["cells"] for row in table["rows"]}
    assert table["best"] == "unet" and cells["unet"][0][0] == "9.87"


PAIR = dict(target="vocals", a="demucs_attention", b="demucs_lstm", metric="SDR")


@pytest.mark.parametrize(
    "values, outcome, first",
    [
        (dict(ci_low=0.5, ci_high=0.9, median_difference=0.7), "above", "B2"),
        (dict(ci_low=-0.9, ci_high=-0.5, median_difference=-0.7), "below", "B1"),
        (dict(ci_low=-0.5, ci_high=0.5), "open", "B2"),
        (dict(ci_low=np.nan), "unknown", "B2"),
    ],
)
def test_changed_difference_changes_the_outcome(change, values, outcome, first):
    facts = change("paired", PAIR, p_corrected=0.2, **values)
    comparison = dict(facts["scores"]["comparisons"])["vocals"][4]
    assert (comparison["outcome"], comparison["first"]) == (outcome, first)
    assert not comparison["confirmed"] and outcome in facts["questions"]["answer"]["attention"]
    if "median_difference" in values:
        assert comparison["size"] == "0.70 dB [0.50, 0.90]"


def test_changed_hypothesis_changes_the_answer(change):
    row = dict(id="phase_true_magnitude_b1", target="vocals")
    facts = change("hypotheses", row, ci_low=0.1, ci_high=0.9, effect=0.5)
    assert facts["questions"]["answer"]["phase"]["above"] == " in one of four cases"
    assert dict(facts["questions"]["phase"])["vocals"] == "open"
