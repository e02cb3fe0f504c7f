import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mss_utils.config import Run, Settings
from mss_utils.listening import blind_test, import_responses, response_files, write_ratings
from mss_utils.listening.blind_test import RATED, mean_opinions, read_response


def response_of(listener="ear", run="r", models=None, n=4, missed=0, order=RATED, **ratings):
    """A downloaded file on `n` excerpts; on `missed` of them the hidden reference is rated 60."""
    ratings = dict(anchor=5, unet=60, demucs_lstm=50, demucs_attention=40) | ratings
    page = dict(target="piano", order=list(order), heard_s={}, comment="")
    pages = [page | dict(track=f"t{i}", ratings=dict(reference=95) | ratings) for i in range(n)]
    for rated in pages[:missed]:
        rated["ratings"] = rated["ratings"] | dict(reference=60)
    fields = dict(format="mss-answers-1", run=run, models=models, listener=listener)
    return json.dumps(fields | dict(started="", finished="", pages=pages)).encode()


def screen(*files, models=None):
    responses = [read_response(file, "file") for file in files]
    return blind_test.screen_responses(responses, "r", models)


@pytest.fixture
def run(tmp_path):
    return Run("r", Settings(), tmp_path / "r")


def test_missing_the_hidden_reference_excludes_a_listener():
    table = screen(response_of("a", n=7, missed=1), response_of("b", n=6, missed=1))
    reasons = table.groupby("listener")["reason"].first()  # 14 % and 17 % are missed
    assert reasons.tolist() == ["", "hidden reference under 90 on 1 of 6 excerpts"]


def test_other_weights_and_other_runs_do_not_count():
    files = [response_of("a", models="old"), response_of("b", models="new"), response_of("c")]
    table = screen(*files, response_of("d", run="other"), models="new")
    assert table.groupby("listener")["kept"].first().tolist() == [False, True, True, False]


def test_mean_opinion_is_over_listeners():
    files = [response_of("a", unet=40, n=8), response_of("b", unet=50), response_of("c", unet=60)]
    table = mean_opinions(screen(*files)).set_index("model")
    assert list(table.index) == list(RATED)
    row, half_width = table.loc["unet"], stats.t.ppf(0.975, 2) * 10 / 3**0.5
    interval = [50, 50 - half_width, 50 + half_width]
    assert [row["mean"], row["ci_low"], row["ci_high"]] == pytest.approx(interval)
    assert (row["listeners"], row["ratings"], row["excerpts"]) == (3, 16, 8)
    two_names = mean_opinions(screen(*files[:2], response_of("a", unet=80, n=8)))
    row = two_names.set_index("model").loc["unet"]
    assert (row["mean"], row["listeners"]) == (55, 2) and np.isnan(row["ci_low"])


def test_responses_become_tables(run, tmp_path):
    ratings, opinions = write_ratings(run)
    assert pd.read_csv(run.table("ratings")).empty and opinions.empty
    assert "nobody" in blind_test.opinion_sentence(ratings, opinions, "piano")
    with pytest.raises(FileNotFoundError, match="No answers in"):
        response_files(str(tmp_path))
    for number, listener in enumerate(("../../x", "poor", "../../x")):
        content = response_of(listener, missed=4 * (listener == "poor"))
        (tmp_path / f"{number}.json").write_bytes(content)
    import_responses(run, response_files(str(tmp_path)))
    answers = run.folder / "answers"
    assert len(list(answers.iterdir())) == len(list(tmp_path.rglob("*/*.json"))) == 2
    (answers / "copy (1).json").write_bytes(content)
    (answers / "windows.json").write_bytes(b"\xef\xbb\xbf" + response_of("windows"))
    ratings, opinions = write_ratings(run)
    assert ratings["letter"][:5].tolist() == list("VWXYZ")
    assert len(pd.read_csv(run.table("ratings"))) == 60
    sentence = blind_test.opinion_sentence(ratings, opinions, "piano")
    assert sentence == "3 listeners, 1 left out; mean opinion A 60, B1 50, B2 40 of 100."


BAD_FILES = {
    b"\xff\xfe": "no answers of the blind test",
    b"{}": "Field required",
    response_of(order=["unet"] * 5): "expected each of reference, anchor",
    response_of(n=2).replace(b"t1", b"t0"): "rated twice",
    response_of(unet=101): "less than or equal to 100",
    response_of(unet=float("nan")): "equal to|finite",
    response_of(run="other"): "rates run 'other', not 'r'",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_file_is_refused_before_any_is_stored(content, run):
    with pytest.raises(ValueError, match=BAD_FILES[content]) as error:
        import_responses(run, [("good.json", response_of()), ("bad.json", content)])
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)
    assert not (run.folder / "answers").exists()


def test_low_anchor_is_the_mixture_without_treble():
    mixture = 0.1 * np.random.default_rng(0).standard_normal((2, 32000)).astype(np.float32)
    spectra = np.fft.rfft([blind_test.low_anchor(mixture, 16000), mixture])
    power = np.abs(spectra[0] / spectra[1]) ** 2
    frequency = np.fft.rfftfreq(32000, 1 / 16000)
    assert np.median(power[:, frequency < 3300]) == pytest.approx(1, abs=0.01)
    assert np.median(power[:, frequency > 3650]) < 1e-4
