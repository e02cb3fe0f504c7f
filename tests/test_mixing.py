import numpy as np
import pytest
import torch
from scipy.signal import correlate

from mss_utils.data import level_db
from mss_utils.mixing import Mixer


def changed(settings, **values):
    return settings.model_copy(update=values)


def test_a_batch_depends_on_seed_and_step_alone(store, small_settings):
    one, other = Mixer(store, small_settings, "piano", 3), Mixer(store, small_settings, "piano", 3)
    for step in (0, 7):
        other.batch(99)
        assert torch.equal(one.batch(step).stems, other.batch(step).stems)
    assert not torch.equal(one.batch(0).stems, one.batch(1).stems)
    assert not torch.equal(one.batch(0).stems, Mixer(store, small_settings, "piano", 4).batch(0).stems)


def test_batches_mixed_ahead_are_the_same_batches(store, small_settings):
    mixer = Mixer(store, small_settings, "piano")
    ahead = list(mixer.batches(3, 7))
    assert len(ahead) == 4 and not list(mixer.batches(7, 7))
    assert all(torch.equal(batch.stems, mixer.batch(step).stems) for step, batch in zip(range(3, 7), ahead))


def test_the_mixture_is_the_sum_of_what_it_contains(store, small_settings):
    batch = Mixer(store, small_settings, "piano").batch(100)
    assert batch.mixture.shape == batch.target.shape == (2, 1, small_settings.segment)
    torch.testing.assert_close(batch.stems.sum(dim=1), batch.mixture)
    assert torch.equal(batch.stems[:, store.stem_index("piano")], batch.target)


def test_the_curriculum_goes_from_two_sources_to_all(store, small_settings):
    mixer = Mixer(store, changed(small_settings, stage2_step=10, stage3_step=20, silent_share=0.0), "piano")
    for step, n_sources in ((0, 2), (9, 2), (10, 3), (19, 3), (20, 4)):
        heard = mixer.batch(step).stems.abs().sum(dim=(2, 3)) > 0  # (batch, stems)
        assert (heard.sum(dim=1) == n_sources).all()
        assert heard[:, mixer.target].all()
    off = Mixer(store, changed(small_settings, curriculum=False), "piano")
    assert (off.batch(0).stems.abs().sum(dim=(2, 3)) > 0).all()


def songs_of(mixer, stems):
    """Which song each stem of an example was cut from, found by correlation with every training song."""
    found = []
    for row, audio in enumerate(stems):
        best = [np.abs(correlate(song[1 + row, 0].astype(float), audio[0], "valid", "fft")).max() for song in mixer._audio]
        found.append(int(np.argmax(best)))
    return found


def test_coherent_examples_keep_one_song_and_random_ones_mix(store, small_settings):
    plain = dict(curriculum=False, gain_db=0.0, segment_s=0.1)
    together = Mixer(store, changed(small_settings, coherent_share=1.0, **plain), "piano")
    apart = Mixer(store, changed(small_settings, coherent_share=0.0, **plain), "piano")
    never = Mixer(store, changed(small_settings, random_mix=False, coherent_share=0.0, **plain), "piano")
    n_songs = lambda mixer: [len(set(songs_of(mixer, mixer.example(np.random.default_rng(seed), 0)))) for seed in range(8)]
    assert set(n_songs(together)) == {1} == set(n_songs(never))
    assert max(n_songs(apart)) > 1


def test_gain_and_polarity_stay_within_what_was_asked(store, small_settings):
    still = Mixer(store, changed(small_settings, gain_db=0.0, flip_polarity=False), "piano")
    moved = Mixer(store, changed(small_settings, gain_db=6.0, flip_polarity=True), "piano")
    audio = np.ones((1, 100), np.float32)
    assert np.array_equal(still._augment(audio, np.random.default_rng(0)), audio)
    gains = np.array([moved._augment(audio, np.random.default_rng(seed))[0, 0] for seed in range(300)])
    assert 0.3 < np.mean(gains < 0) < 0.7
    assert 5 < np.abs(20 * np.log10(np.abs(gains))).max() <= 6.001


def test_swapping_channels(store, small_settings):
    mixer = Mixer(store, changed(small_settings, gain_db=0.0, flip_polarity=False), "piano")
    audio = np.stack([np.zeros(4), np.ones(4)]).astype(np.float32)
    swapped = [mixer._augment(audio, np.random.default_rng(seed))[0, 0] for seed in range(100)]
    assert 0.3 < np.mean(swapped) < 0.7


def test_silent_targets_are_drawn_again(store, small_settings, monkeypatch):
    mixer = Mixer(store, changed(small_settings, silent_share=0.0), "piano")
    for audio in (quiet := [np.array(song) for song in mixer._audio])[1:]:
        audio[1 + mixer.target] = 0
    monkeypatch.setattr(mixer, "_audio", quiet)
    levels = [level_db(mixer.example(np.random.default_rng(seed), 0)[mixer.target]) for seed in range(40)]
    assert np.mean(np.isfinite(levels)) > 0.9


def test_a_segment_longer_than_every_song_is_an_error(store, small_settings):
    with pytest.raises(ValueError, match="segment_s=60.*set segment_s lower"):
        Mixer(store, changed(small_settings, segment_s=60.0), "piano")
