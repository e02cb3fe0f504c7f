import json
from codecs import BOM_UTF8

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mss_utils.config import Run, Settings
from mss_utils.files import write_bytes
from mss_utils.listening import answers_upload, widgets, write_ratings
from mss_utils.listening.blind_test import RATED, import_responses, low_anchor, weights_digest


def response_of(listener="ear", run="r", models=None, n=4, missed=0, order=RATED, **ratings):
    """A downloaded file on `n` excerpts; on `missed` of them the hidden reference is rated 60."""
    ratings = dict(anchor=5, unet=60, demucs_lstm=50, demucs_attention=40) | ratings
    page = dict(target="piano", order=list(order), heard_s={}, comment="")
    pages = [page | dict(track=f"t{i}", ratings=dict(reference=95) | ratings) for i in range(n)]
    for rated in pages[:missed]:
        rated["ratings"] = rated["ratings"] | dict(reference=60)
    fields = dict(format="mss-answers-1", run=run, models=models, listener=listener)
    return json.dumps(fields | dict(started="", finished="", pages=pages)).encode()


@pytest.fixture
def run(tmp_path):
    return Run("r", Settings(), tmp_path / "r")


def tables(run, *files):
    import_responses(run, [("file", content) for content in files])
    return write_ratings(run)


def test_answers_that_do_not_count(run):
    path = run.model_folder("piano", "unet") / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"new")
    missed = [response_of("a", n=7, missed=1), response_of("b", n=6, missed=1)]  # 14 % and 17 %
    weights = [response_of("c", models="old"), response_of("d", models=weights_digest(run))]
    other = response_of("e", run="other")
    with pytest.raises(ValueError, match="file rates run 'other', not 'r'"):
        tables(run, other)
    write_bytes(run.folder / "answers" / "copied.json", other)
    ratings, opinions = tables(run, *missed, *weights)
    first = ratings.groupby("listener")[["kept", "reason"]].first()
    assert first["kept"].tolist() == [True, False, False, True, False]
    assert first.loc["b", "reason"] == "hidden reference under 90 on 1 of 6 excerpts"
    assert first.loc["e", "reason"] == "about run other"
    assert set(opinions["ratings"]) == {7 + 4}


def test_mean_opinion_is_over_listeners(run):
    files = [response_of("a", unet=40, n=8), response_of("b", unet=50)]
    row = tables(run, *files, response_of("a", unet=80, n=8))[1].set_index("model").loc["unet"]
    assert (row["mean"], row["listeners"]) == (55, 2) and np.isnan(row["ci_low"])
    table = tables(run, response_of("c", unet=70))[1].set_index("model")
    assert list(table.index) == list(RATED)
    row, half_width = table.loc["unet"], stats.t.ppf(0.975, 2) * np.std([60, 50, 70], ddof=1)
    interval = [60, 60 - half_width / 3**0.5, 60 + half_width / 3**0.5]
    assert [row["mean"], row["ci_low"], row["ci_high"]] == pytest.approx(interval)
    assert (row["listeners"], row["ratings"], row["excerpts"]) == (3, 24, 8)


def test_answers_become_tables_once_and_stay_inside(run, tmp_path):
    assert all(table.empty for table in write_ratings(run))
    content = BOM_UTF8 + response_of("../../x")
    tables(run, content, content)
    [path] = tmp_path.rglob("*.json")
    assert path.parent == run.folder / "answers"
    (path.parent / "copy (1).json").write_bytes(path.read_bytes())
    ratings, _ = write_ratings(run)
    assert ratings["letter"][:5].tolist() == list("VWXYZ")
    assert len(pd.read_csv(run.table("ratings"))) == 4 * 5


BAD_FILES = {
    b"\xff\xfe": "no answers of the blind test",
    b"{}": "Field required",
    response_of(order=["unet"] * 5): "expected each of reference, anchor",
    response_of().replace(b'"t1"', b'"t0"'): "an excerpt is rated twice",
    response_of(unet=float("nan")): "equal to|finite",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_file_is_refused_before_any_is_stored(content, run):
    with pytest.raises(ValueError, match=BAD_FILES[content]) as error:
        import_responses(run, [("good.json", response_of()), ("bad.json", content)])
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)
    assert not (run.folder / "answers").exists()


def test_uploaded_answers_are_imported_or_refused(run, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    for name in ("display", "update"):
        monkeypatch.setattr(widgets.DisplayHandle, name, lambda _, item: shown.append(item.data))
    answers_upload(run)
    for content in (b"<b>", response_of("<b>ear</b>", missed=4), response_of("<b>ear</b>")):
        file = dict(name="<b>.json", type="", size=1, content=content, last_modified=None)
        shown[0].notify_change(dict(name="value", type="change", new=(file,)))
    assert not any("<b>" in html for html in shown[1:])
    assert "no answers" in shown[-3] and "on 4 of 4" in shown[-2] and "60.0" in shown[-1]
    assert widgets._uploaded({"a.json": dict(content=b"x")}) == [("a.json", b"x")]  # ipywidgets 7


def test_low_anchor_is_the_mixture_without_treble():
    mixture = 0.1 * np.random.default_rng(0).standard_normal((2, 32000)).astype(np.float32)
    spectra = np.fft.rfft([low_anchor(mixture, 16000), mixture])
    power = np.abs(spectra[0] / spectra[1]) ** 2
    frequency = np.fft.rfftfreq(32000, 1 / 16000)
    assert np.median(power[:, frequency < 3300]) == pytest.approx(1, abs=0.01)
    assert np.median(power[:, frequency > 3650]) < 1e-4
