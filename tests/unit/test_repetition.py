"""The damaged repeat, separated by models whose gains are known."""

import numpy as np
import pytest
import torch

from mss_utils.analysis import CONDITIONS, find_loops
from mss_utils.analysis.repetition import lags_s, least_similar, loop_scores, loop_starts, make_loop
from mss_utils.config import Run
from mss_utils.data import level_db, rms

RATE = 16000


def noise(seconds=12, seed=0):
    return np.random.default_rng(seed).standard_normal((1, seconds * RATE)).astype(np.float32)


def loop(samples=3 * RATE):
    return make_loop(noise(), noise(seed=1), 4 * RATE, RATE, samples, RATE)


def level_model(x):
    """Scale the mixture by the level of its first second: uses context but no repetition."""
    level = x[..., :RATE].square().mean(dim=(1, 2), keepdim=True).sqrt()
    return x * (0.1 * level / (level + 0.001))


def test_only_copying_has_a_repetition_gain():
    scores = loop_scores(lambda x: torch.roll(x, RATE, dims=-1), loop())  # copies one lag earlier
    assert scores["repeat"] == np.inf and scores["different"] < 0 and scores["silent"] == 0
    scores = loop_scores(level_model, loop())
    assert scores["repeat"] == pytest.approx(scores["different"], abs=1e-3)
    assert abs(scores["different"] - scores["silent"]) > 0.1


def test_conditions_differ_only_around_the_damage():
    (repeat, truth, damage), (different, _, _), (silent, _, _) = (loop()[x] for x in CONDITIONS)
    assert damage == slice(RATE, 2 * RATE) and repeat.shape == (1, 3 * RATE)
    assert (repeat[:, damage] == different[:, damage]).all()
    assert (repeat[:, damage] == silent[:, damage]).all()
    assert rms(repeat[:, :RATE]) == pytest.approx(rms(different[:, :RATE]), rel=1e-5)
    assert rms(silent[:, :RATE]) == 0 and not np.allclose(repeat, different)
    assert np.array_equal(truth[:, damage], truth[:, :RATE])
    burst = repeat[:, damage] - truth[:, damage]
    assert level_db(truth[:, damage]) - level_db(burst) == pytest.approx(-10, abs=0.01)


@pytest.mark.parametrize("samples", [2 * RATE + 1, 7 * RATE])
def test_every_damaged_sample_has_a_clean_repeat(samples):
    mixture, truth, damage = loop(samples)["repeat"]
    inside = np.arange(damage.start, damage.stop)
    source = np.where(inside >= RATE, inside - RATE, inside + RATE)
    assert np.abs(mixture[0, source] - truth[0, damage]).max() < 1e-6
    assert np.array_equal(truth[:, damage], loop()["repeat"][1][:, :RATE])  # one whole repetition


def test_least_similar_stretch_is_found():
    hz = np.repeat([440, 2000, 440], [4 * RATE, RATE, 3 * RATE])
    target = np.sin(2 * np.pi * np.cumsum(hz) / RATE)[None].astype(np.float32)
    assert least_similar(target, 0, RATE, 1) == [4 * RATE]


def test_loops_need_repetitions_in_segment_and_track():
    assert lags_s(4.0) == {1: True, 2: True, 4: False} and list(lags_s(17.0)) == [1, 2, 4, 8]
    short = noise(2)
    assert loop_starts(short, short, RATE) == [] == loop_starts(noise(), 0 * noise(), RATE)
    assert make_loop(short, short, 0, RATE, 3 * RATE, RATE) == {}


def test_find_loops(songs_store, tmp_path):
    store, settings = songs_store
    run = Run("loops", settings.model_copy(update=dict(segment_s=2.0)), tmp_path)
    loops = find_loops(run, store, "piano", 1.0)
    assert loops and {name for name, _ in loops} <= {track.name for track in store.split("test")}
    mixture, truth, damage = next(iter(loops.values()))["silent"]
    assert mixture.shape == (1, 2 * RATE) and damage.stop - damage.start == RATE
    burst = (mixture - truth)[0, damage]
    assert abs(np.corrcoef(burst, truth[0, damage])[0, 1]) < 0.5  # made of the residual
