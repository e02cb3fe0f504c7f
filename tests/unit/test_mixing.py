import numpy as np
import pytest
import torch

from mss_utils.data import build_store
from mss_utils.mixing import Mixer

STILL = dict(
    gain_db=0.0, flip_polarity=False, swap_channels=False, curriculum=False, silent_share=0.0
)


def changed(settings, **values):
    return settings.model_copy(update=values)


def mixer_on(store, settings, sound, **values) -> Mixer:
    """A mixer for the piano whose songs hold `sound(song, row)`, int16 `(samples,)` or a number; row 0 is the mixture."""
    mixer = Mixer(store, changed(settings, **values), "piano")
    for song, audio in enumerate(mixer._audio):
        mixer._audio[song] = np.empty(audio.shape, np.int16)
        for row in range(len(audio)):
            mixer._audio[song][row] = sound(song, row)
    return mixer


def draws(mixer, count, step=1000):
    return [mixer.draw(step + index) for index in range(count)]


# --- randomness


def test_a_batch_depends_on_seed_and_step_alone(store, small_settings):
    one, other = Mixer(store, small_settings, "piano", 3), Mixer(store, small_settings, "piano", 3)
    for step in (0, 7):
        other.batch(99)
        assert torch.equal(one.batch(step).stems, other.batch(step).stems)
    assert not torch.equal(one.batch(0).stems, one.batch(1).stems)
    assert not torch.equal(
        one.batch(0).stems, Mixer(store, small_settings, "piano", 4).batch(0).stems
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_read_ahead_are_the_same_batches(store, small_settings, workers):
    mixer = Mixer(store, changed(small_settings, loader_workers=workers), "piano")
    ahead = list(mixer.batches(3, 12))
    assert len(ahead) == 9 and not list(mixer.batches(7, 7))
    assert all(
        torch.equal(batch.stems, mixer.batch(step).stems)
        for step, batch in zip(range(3, 12), ahead)
    )


def test_several_workers_never_draw_the_same_crops(store, small_settings):
    """Every sample says where it lies, so a segment's first sample is its position."""
    position = lambda song, row: np.arange(48000) // 2 + 2000
    mixer = mixer_on(store, small_settings, position, loader_workers=4, **STILL)
    starts = [batch.target[:, 0, 0] for batch in mixer.batches(0, 30)]
    assert (
        len(torch.cat(starts).unique()) >= 55
    )  # of 60 drawn from 20,000: one repetition in ten tries


# --- what a mixture contains


def test_the_mixture_is_the_sum_of_what_it_contains(store, small_settings):
    for values in ({}, dict(speed_semitones=2)):
        batch = Mixer(store, changed(small_settings, **values), "piano").batch(100)
        assert batch.mixture.shape == batch.target.shape == (2, 1, small_settings.segment)
        assert torch.equal(batch.stems.sum(dim=1), batch.mixture)
        assert torch.equal(batch.stems[:, store.stem_index("piano")], batch.target)


def test_the_loader_hands_over_the_samples_of_the_store_as_they_are(store, small_settings):
    mixer = Mixer(store, changed(small_settings, **STILL), "piano")
    draw = mixer.draw(5)
    assert draw.segments.dtype == torch.int16
    scales = {track.scale for track in mixer.tracks}
    assert {round(gain, 9) for gain in draw.gains.flatten().tolist()} <= {
        round(float(np.float32(scale)), 9) for scale in scales
    }
    torch.testing.assert_close(
        mixer.assemble(draw).stems,
        draw.segments.float() * draw.gains[..., None, None],
        rtol=0,
        atol=0,
    )


def test_the_curriculum_goes_from_two_sources_to_all_and_is_drawn_per_example(
    store, small_settings
):
    mixer = Mixer(
        store,
        changed(small_settings, stage2_step=10, stage3_step=20, silent_share=0.0, batch_size=8),
        "piano",
    )
    for step, n_sources in ((0, 2), (9, 2), (10, 3), (19, 3), (20, 4)):
        heard = mixer.batch(step).stems.abs().sum(dim=(2, 3)) > 0  # (batch, stems)
        assert (heard.sum(dim=1) == n_sources).all()
        assert heard[:, mixer.target].all()
        assert step == 20 or len(heard.unique(dim=0)) > 1, "every example has the same distractors"
    off = Mixer(store, changed(small_settings, curriculum=False, silent_share=0.0), "piano")
    assert (off.batch(0).stems.abs().sum(dim=(2, 3)) > 0).all()


@pytest.mark.parametrize(
    "values, share",
    [
        (dict(coherent_share=0.0), 0.0),
        (dict(coherent_share=0.25), 0.25),
        (dict(coherent_share=1.0), 1.0),
        (dict(coherent_share=0.0, random_mix=False), 1.0),
    ],
)
def test_the_stated_share_of_examples_keeps_one_song_together(store, small_settings, values, share):
    labelled = mixer_on(
        store, small_settings, lambda song, row: 2000 + 100 * song, batch_size=20, **STILL, **values
    )
    songs = torch.cat(
        [draw.segments[:, :, 0, 0] for draw in draws(labelled, 20)]
    )  # (400 examples, stems)
    together = (songs == songs[:, :1]).all(dim=1).float().mean().item()
    by_chance = (1 - share) / len(labelled.tracks) ** (songs.shape[1] - 1)
    assert abs(together - share - by_chance) < 0.06
    together = songs[(songs == songs[:, :1]).all(dim=1), 0]
    assert share == 0 or len(together.unique()) == len(labelled.tracks)


def test_coherent_stems_play_at_the_same_time(store, small_settings):
    position = lambda song, row: np.arange(48000) // 2 + 2000
    for share, equal in ((1.0, True), (0.0, False)):
        segments = (
            mixer_on(store, small_settings, position, coherent_share=share, **STILL)
            .draw(0)
            .segments
        )
        assert torch.equal(segments, segments[:, :1].expand_as(segments)) is equal


# --- augmentation, each part by itself


def test_nothing_is_changed_where_everything_is_switched_off(store, small_settings):
    mixer = mixer_on(store, small_settings, lambda song, row: 1000 * (1 + row), **STILL)
    assert torch.equal(
        mixer.batch(0).stems[:, :, 0, 0] / mixer.tracks[0].scale,
        torch.tensor([[2000.0, 3000.0, 4000.0, 5000.0]] * 2),
    )


def test_gain_and_polarity_stay_within_what_was_asked(store, small_settings):
    values = STILL | dict(gain_db=6.0, flip_polarity=True)
    mixer = mixer_on(store, small_settings, lambda song, row: 1000, **values)
    gains = torch.cat([draw.gains.flatten() for draw in draws(mixer, 60)]) / mixer.tracks[0].scale
    assert 0.4 < (gains < 0).float().mean() < 0.6
    gains_db = 20 * gains.abs().log10()
    assert (
        5.5 < gains_db.max() <= 6.001
        and -6.001 <= gains_db.min() < -5.5
        and abs(gains_db.mean()) < 0.6
    )
    only_gain = mixer_on(
        store, small_settings, lambda song, row: 1000, **(values | dict(flip_polarity=False))
    )
    assert all((draw.gains > 0).all() for draw in draws(only_gain, 10))


def test_swapping_channels(dataset, small_settings):
    stereo = build_store(dataset, 16000, 2)
    left_right = lambda song, row: np.array([[1000], [3000]])
    swap = mixer_on(
        stereo, small_settings, left_right, **STILL | dict(swap_channels=True, channels=2)
    )
    left = (
        torch.cat([batch.stems[:, :, 0, 0].flatten() for batch in swap.batches(0, 40)])
        / swap.tracks[0].scale
    )
    assert set(left.round().tolist()) == {1000, 3000} and 0.4 < (left > 2000).float().mean() < 0.6
    off = mixer_on(stereo, small_settings, left_right, **STILL | dict(channels=2))
    assert all((batch.stems[:, :, 0] < batch.stems[:, :, 1]).all() for batch in off.batches(0, 10))


def frequency_of(audio, low, rate=16000):
    """Strongest frequency of `(samples,)` above `low` in Hz; the spectrum is padded, for a small part of a bin."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 8 * len(audio)))
    frequencies = np.fft.rfftfreq(8 * len(audio), 1 / rate)
    spectrum[frequencies < low] = 0
    return frequencies[spectrum.argmax()]


def edges_of(audio, rate=16000):
    """Seconds at which `(samples,)` goes from quiet to loud or back."""
    envelope = np.sqrt(np.convolve(audio**2, np.ones(800) / 800, "same"))
    return np.flatnonzero(np.diff(envelope > 0.5 * envelope.max())) / rate


def test_speed_changes_pitch_and_tempo_by_whole_semitones_and_no_level(store, small_settings):
    """A tone of 440 Hz, 0.3 s on and 0.3 s off."""
    time = np.arange(48000) / 16000
    tone = np.where(time % 0.6 < 0.3, 8000 * np.sin(2 * np.pi * 440 * time), 0).astype(np.int16)
    mixer = mixer_on(
        store,
        small_settings,
        lambda song, row: tone,
        **STILL,
        speed_semitones=3,
        coherent_share=0.0,
        segment_s=1.5,
        batch_size=4,
    )
    draw = mixer.draw(0)
    before, after = (
        draw.segments.flatten(0, 2).float().numpy(),
        mixer.assemble(draw).stems.flatten(0, 2).numpy(),
    )
    assert after.shape == (16, 24000) and set(draw.semitones.flatten().tolist()) == {
        -3,
        -2,
        -1,
        0,
        1,
        2,
        3,
    }
    for heard, audio, semitones in zip(before, after, draw.semitones.flatten().tolist()):
        speed = 2 ** (semitones / 12)
        assert abs(12 * np.log2(frequency_of(audio, low=300) / 440) - semitones) < 0.06
        wanted = edges_of(heard[: round(1.5 * 16000 * speed)]) / speed
        np.testing.assert_allclose(edges_of(audio), wanted, atol=0.01)
        assert (
            abs(
                np.quantile(np.abs(audio), 0.95)
                / (np.quantile(np.abs(heard), 0.95) * mixer.tracks[0].scale)
                - 1
            )
            < 0.02
        )


def test_a_coherent_example_changes_speed_as_a_whole(store, small_settings):
    for share, equal in ((1.0, True), (0.0, False)):
        semitones = (
            Mixer(
                store,
                changed(small_settings, coherent_share=share, **STILL, speed_semitones=4),
                "piano",
            )
            .draw(3)
            .semitones
        )
        assert torch.equal(semitones, semitones[:, :1].expand_as(semitones)) is equal


# --- silence


def test_silent_targets_are_drawn_again_and_the_stated_share_is_kept(store, small_settings):
    """The piano plays in a twentieth of the first song and nowhere else."""
    row_of_piano = 1 + store.stem_index("piano")
    burst = np.where(np.arange(48000) < 2400, 5000, 0)
    sound = lambda song, row: 1000 if row != row_of_piano else burst if song == 0 else 0
    values = STILL | dict(segment_s=0.05, batch_size=20)
    heard = lambda mixer: (
        torch.cat([mixer.batch(step).target.abs().amax(dim=(1, 2)) > 0 for step in range(20)])
        .float()
        .mean()
        .item()
    )
    assert (
        heard(mixer_on(store, small_settings, sound, **values)) > 0.6
    )  # it sounds in one position of fifty
    everywhere = lambda song, row: 1000
    assert heard(mixer_on(store, small_settings, everywhere, **values)) == 1
    assert (
        abs(
            heard(mixer_on(store, small_settings, everywhere, **(values | dict(silent_share=0.25))))
            - 0.75
        )
        < 0.07
    )


def test_a_segment_longer_than_every_song_is_an_error(store, small_settings):
    with pytest.raises(ValueError, match="segment_s=60.*set segment_s lower"):
        Mixer(store, changed(small_settings, segment_s=60.0), "piano")


def test_processes_share_a_batch_without_overlap(store, small_settings):
    mixer = Mixer(store, small_settings.model_copy(update=dict(batch_size=4)), "piano")
    whole = mixer.batch(7)
    shares = [next(mixer.batches(7, 8, share=(index, 2))) for index in range(2)]
    together = torch.stack([share.stems for share in shares], dim=1).flatten(
        0, 1
    )  # examples 0, 2 and 1, 3 in turn
    assert torch.equal(together, whole.stems)
