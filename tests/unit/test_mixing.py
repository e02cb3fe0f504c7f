"""Training batches: reproducible, mixed and augmented as the settings say."""

import numpy as np
import pytest
import torch

from mss_utils.data import build_store
from mss_utils.mixing import Mixer

PLAIN = dict(
    gain_db=0.0, flip_polarity=False, swap_channels=False, curriculum=False, silent_share=0.0
)


def make_mixer(store, settings, seed=0, **values):
    return Mixer(store, settings.model_copy(update=values), "piano", seed)


def fill(mixer, sound):
    """Replace the songs by `sound(song, row)`, int16; row 0 is the mixture."""
    for song, audio in enumerate(mixer._audio):
        mixer._audio[song] = np.empty(audio.shape, np.int16)
        for row in range(len(audio)):
            mixer._audio[song][row] = sound(song, row)
    return mixer


def constant(song, row):
    return 1000


def position(song, row):
    """Return samples that say where they lie in the song."""
    return np.arange(48000) // 2 + 2000


def is_active(stems):
    return stems.abs().amax(dim=(-2, -1)) > 0


# --- reproducible


def test_batch_depends_on_seed_and_step_alone(store, small_settings):
    one, other = (make_mixer(store, small_settings, 3) for _ in range(2))
    for step in (0, 7):
        other.batch(99)
        assert torch.equal(one.batch(step).stems, other.batch(step).stems)
    assert not torch.equal(one.batch(0).stems, one.batch(1).stems)
    other_seed = make_mixer(store, small_settings, 4)
    assert not torch.equal(one.batch(0).stems, other_seed.batch(0).stems)


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(store, small_settings, workers):
    mixer = make_mixer(store, small_settings, loader_workers=workers)
    ahead = list(mixer.batches(3, 12))
    assert len(ahead) == 9 and not list(mixer.batches(7, 7))
    for step, batch in enumerate(ahead, start=3):
        assert torch.equal(batch.stems, mixer.batch(step).stems)


def test_workers_draw_different_segments(store, small_settings):
    mixer = fill(make_mixer(store, small_settings, loader_workers=4, **PLAIN), position)
    starts = [batch.target[:, 0, 0] for batch in mixer.batches(0, 30)]
    assert len(torch.cat(starts).unique()) >= 55  # of 60 drawn from 20,000


def test_processes_share_a_batch(store, small_settings):
    mixer = make_mixer(store, small_settings, batch_size=4)
    parts = [next(mixer.batches(7, 8, share=(index, 2))) for index in range(2)]
    together = torch.stack([part.stems for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(together, mixer.batch(7).stems)


# --- content of a mixture


@pytest.mark.parametrize("semitones", [0, 2])
def test_stems_sum_to_the_mixture(store, small_settings, semitones):
    batch = make_mixer(store, small_settings, speed_semitones=semitones).batch(100)
    assert batch.mixture.shape == batch.target.shape == (2, 1, small_settings.segment)
    assert torch.equal(batch.stems.sum(dim=1), batch.mixture)
    assert torch.equal(batch.stems[:, store.stem_index("piano")], batch.target)


def test_plain_batch_is_the_samples_of_the_store(store, small_settings):
    mixer = make_mixer(store, small_settings, **PLAIN)
    raw = mixer.draw(5)
    assert raw.segments.dtype == torch.int16
    scales = torch.tensor([track.scale for track in mixer.tracks])
    assert torch.isin(raw.gains, scales).all()
    expected = raw.segments.float() * raw.gains[..., None, None]
    assert torch.equal(mixer.assemble(raw).stems, expected)


def test_curriculum(store, small_settings):
    stages = dict(stage2_step=10, stage3_step=20, silent_share=0.0, batch_size=8)
    mixer = make_mixer(store, small_settings, **stages)
    for step, n_sources in ((0, 2), (9, 2), (10, 3), (19, 3), (20, 4)):
        active = is_active(mixer.batch(step).stems)  # (batch, stems)
        assert (active.sum(dim=1) == n_sources).all() and active[:, mixer.target].all()
        assert step == 20 or len(active.unique(dim=0)) > 1, "every example has the same sources"
    off = make_mixer(store, small_settings, curriculum=False, silent_share=0.0)
    assert is_active(off.batch(0).stems).all()


@pytest.mark.parametrize(
    "values, share",
    [
        (dict(coherent_share=0.0), 0.0),
        (dict(coherent_share=0.25), 0.25),
        (dict(coherent_share=1.0), 1.0),
        (dict(coherent_share=0.0, random_mix=False), 1.0),
    ],
)
def test_share_of_coherent_examples(store, small_settings, values, share):
    mixer = make_mixer(store, small_settings, batch_size=20, **PLAIN, **values)
    fill(mixer, lambda song, row: 2000 + 100 * song)
    songs = torch.cat([mixer.draw(step).segments[:, :, 0, 0] for step in range(20)])
    together = (songs == songs[:, :1]).all(dim=1)  # of 400 examples
    by_chance = (1 - share) / len(mixer.tracks) ** (songs.shape[1] - 1)
    assert abs(together.float().mean() - share - by_chance) < 0.06
    assert share == 0 or len(songs[together, 0].unique()) == len(mixer.tracks)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_coherent_stems_start_together(store, small_settings, share):
    values = PLAIN | dict(coherent_share=share, speed_semitones=4)
    raw = fill(make_mixer(store, small_settings, **values), position).draw(3)
    for drawn in (raw.segments, raw.semitones):
        assert torch.equal(drawn, drawn[:, :1].expand_as(drawn)) is (share == 1)


def test_silent_segments_are_drawn_again(store, small_settings):
    """The piano plays in a twentieth of the first song and nowhere else."""
    piano, burst = 1 + store.stem_index("piano"), np.where(np.arange(48000) < 2400, 5000, 0)

    def sound(song, row):
        if row != piano:
            return 1000
        return burst if song == 0 else 0

    def active_share(sound, **values):
        values = PLAIN | dict(segment_s=0.05, batch_size=20) | values
        mixer = fill(make_mixer(store, small_settings, **values), sound)
        active = [is_active(mixer.batch(step).target) for step in range(20)]
        return torch.cat(active).float().mean().item()

    assert active_share(sound) > 0.6  # one position of fifty has the piano
    assert active_share(constant) == 1
    assert abs(active_share(constant, silent_share=0.25) - 0.75) < 0.07


def test_segment_longer_than_every_song(store, small_settings):
    with pytest.raises(ValueError, match="segment_s=60.*set segment_s lower"):
        make_mixer(store, small_settings, segment_s=60.0)


# --- augmentation, each part by itself


def test_gain_and_polarity(store, small_settings):
    values = PLAIN | dict(gain_db=6.0, flip_polarity=True)
    mixer = fill(make_mixer(store, small_settings, **values), constant)
    gains = torch.cat([mixer.draw(step).gains.flatten() for step in range(60)])
    assert 0.4 < (gains < 0).float().mean() < 0.6
    gains_db = 20 * (gains.abs() / mixer.tracks[0].scale).log10()
    assert 5.5 < gains_db.max() <= 6.001 and -6.001 <= gains_db.min() < -5.5
    assert abs(gains_db.mean()) < 0.6
    positive = make_mixer(store, small_settings, **values | dict(flip_polarity=False))
    assert (positive.draw(0).gains > 0).all()


@pytest.mark.parametrize("swap", [True, False])
def test_swap_of_channels(dataset, small_settings, swap):
    values = PLAIN | dict(swap_channels=swap, channels=2)
    mixer = make_mixer(build_store(dataset, 16000, 2), small_settings, **values)
    fill(mixer, lambda song, row: np.array([[1000], [3000]]))
    stems = torch.cat([batch.stems for batch in mixer.batches(0, 40)])
    swapped = (stems[:, :, 0] > stems[:, :, 1])[..., 0].float().mean()
    assert 0.4 < swapped < 0.6 if swap else swapped == 0


def peak_hz(audio, low_hz, rate=16000):
    """Return the strongest frequency of `(samples,)` above `low_hz`."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 8 * len(audio)))
    frequencies = np.fft.rfftfreq(8 * len(audio), 1 / rate)
    spectrum[frequencies < low_hz] = 0
    return frequencies[spectrum.argmax()]


def edges_s(audio, rate=16000):
    """Return the times at which `(samples,)` goes from quiet to loud or back."""
    envelope = np.sqrt(np.convolve(audio**2, np.ones(800) / 800, "same"))
    return np.flatnonzero(np.diff(envelope > 0.5 * envelope.max())) / rate


def test_speed_changes_pitch_and_tempo_together(store, small_settings):
    """A tone of 440 Hz, 0.3 s on and 0.3 s off; its level stays."""
    time = np.arange(48000) / 16000
    tone = np.where(time % 0.6 < 0.3, 8000 * np.sin(2 * np.pi * 440 * time), 0).astype(np.int16)
    values = dict(speed_semitones=3, coherent_share=0.0, segment_s=1.5, batch_size=4)
    mixer = fill(make_mixer(store, small_settings, **PLAIN, **values), lambda song, row: tone)
    raw = mixer.draw(0)
    before = raw.segments.flatten(0, 2).float().numpy() * mixer.tracks[0].scale
    after = mixer.assemble(raw).stems.flatten(0, 2).numpy()
    semitones = raw.semitones.flatten().tolist()
    assert after.shape == (16, 24000) and set(semitones) == set(range(-3, 4))
    for source, audio, n in zip(before, after, semitones, strict=True):
        speed = 2 ** (n / 12)
        assert abs(12 * np.log2(peak_hz(audio, low_hz=300) / 440) - n) < 0.06
        expected_s = edges_s(source[: round(1.5 * 16000 * speed)]) / speed
        np.testing.assert_allclose(edges_s(audio), expected_s, atol=0.01)
        levels = [np.quantile(np.abs(part), 0.95) for part in (audio, source)]
        assert abs(levels[0] / levels[1] - 1) < 0.02
