"""Training batches: reproducible, mixed and augmented as the settings say."""

import numpy as np
import pytest
import torch

from mss_utils.data import build_store
from mss_utils.mixing import Mixer, speed_of

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


def position(song, row):
    """Return samples that say where they lie in the song."""
    return np.arange(48000) // 2 + 2000


def is_active(stems):
    return stems.abs().amax(dim=(-2, -1)) > 0


def test_batch_depends_on_seed_and_step_alone(store, small_settings):
    one, other, seed = (make_mixer(store, small_settings, seed) for seed in (3, 3, 4))
    for step in (0, 7):
        other.batch(99)
        assert torch.equal(one.batch(step).stems, other.batch(step).stems)
    assert not torch.equal(one.batch(0).stems, one.batch(1).stems)
    assert not torch.equal(one.batch(0).stems, seed.batch(0).stems)


def test_reading_ahead_changes_nothing(store, small_settings):
    mixer = make_mixer(store, small_settings, loader_workers=3)
    ahead = list(mixer.batches(3, 12))
    assert len(ahead) == 9 and not list(mixer.batches(7, 7))
    for step, batch in enumerate(ahead, start=3):
        assert torch.equal(batch.stems, mixer.batch(step).stems)


def test_processes_share_a_batch(store, small_settings):
    mixer = make_mixer(store, small_settings, batch_size=4)
    parts = [next(mixer.batches(7, 8, share=(index, 2))) for index in range(2)]
    together = torch.stack([part.stems for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(together, mixer.batch(7).stems)


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


@pytest.mark.parametrize("share, random_mix", [(0, True), (0.25, True), (1, True), (0, False)])
def test_share_of_coherent_examples(store, small_settings, share, random_mix):
    values = PLAIN | dict(coherent_share=share, random_mix=random_mix, speed_semitones=4)
    mixer = make_mixer(store, small_settings, batch_size=20, **values)
    raws = [fill(mixer, lambda song, row: 2000 + 100 * song).draw(step) for step in range(20)]
    songs = torch.cat([raw.segments[:, :, 0, 0] for raw in raws])
    together = (songs == songs[:, :1]).all(dim=1)  # of 400 examples
    share = share if random_mix else 1
    by_chance = (1 - share) / len(mixer.tracks) ** (songs.shape[1] - 1)
    assert abs(together.float().mean() - share - by_chance) < 0.06
    assert share == 0 or len(songs[together, 0].unique()) == len(mixer.tracks)
    for drawn in (raws[0].semitones, fill(mixer, position).draw(3).segments[..., 0]):
        assert (drawn == drawn[:, :1]).all() == (share == 1)


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
    silent = active_share(lambda song, row: 1000, silent_share=0.25)
    assert abs(silent - 0.75) < 0.07


def test_segment_longer_than_every_song(store, small_settings):
    with pytest.raises(ValueError, match="segment_s=60.*set segment_s lower"):
        make_mixer(store, small_settings, segment_s=60.0)


def test_gain_and_polarity(store, small_settings):
    values = PLAIN | dict(gain_db=6.0, flip_polarity=True)
    mixer = make_mixer(store, small_settings, **values)
    raws = [mixer.draw(step) for step in range(60)]
    gains = torch.cat([raw.gains.flatten() for raw in raws])
    assert 0.4 < (gains < 0).float().mean() < 0.6
    gains_db = 20 * (gains.abs() / mixer.tracks[0].scale).log10()
    assert 5.5 < gains_db.max() <= 6.001 and -6.001 <= gains_db.min() < -5.5
    assert abs(gains_db.mean()) < 0.6


@pytest.mark.parametrize("swap", [True, False])
def test_swap_of_channels(dataset, small_settings, swap):
    values = PLAIN | dict(swap_channels=swap, channels=2)
    mixer = make_mixer(build_store(dataset, 16000, 2), small_settings, **values)
    fill(mixer, lambda song, row: np.array([[1000], [3000]]))
    stems = torch.cat([batch.stems for batch in mixer.batches(0, 40)])
    swapped = (stems[:, :, 0] > stems[:, :, 1])[..., 0].float().mean()
    assert 0.4 < swapped < 0.6 if swap else swapped == 0


def test_speed_changes_pitch_and_tempo_together(store, small_settings):
    """A tone of 440 Hz that swells and fades; its level stays."""
    time = np.arange(48000) / 16000
    tone = 8000 * np.sin(2 * np.pi * 440 * time) * np.sin(2 * np.pi * time)
    values = dict(speed_semitones=3, coherent_share=0.0, segment_s=1.5, batch_size=4)
    mixer = make_mixer(store, small_settings, **PLAIN, **values)
    raw = fill(mixer, lambda song, row: tone.astype(np.int16)).draw(0)
    before = raw.segments.flatten(0, 2) * mixer.tracks[0].scale
    after = mixer.assemble(raw).stems.flatten(0, 2)[:, 100:-100]  # without the edges
    semitones = raw.semitones.flatten().tolist()
    assert set(semitones) == set(range(-3, 4))
    for source, audio, n in zip(before.numpy(), after.numpy(), semitones, strict=True):
        speed = float(speed_of(n))
        assert abs(12 * np.log2(speed) - n) < 0.05
        expected = np.interp(np.arange(100, 23900) * speed, np.arange(len(source)), source)
        np.testing.assert_allclose(audio, expected, atol=0.02 * np.abs(source).max())
