import numpy as np
import pytest
import torch

from mss_utils.separation.overlap_add import separate, separated_blocks

RATE = 16000


class Identity(torch.nn.Module):
    """Returns its input and keeps the shapes."""

    def __init__(self, channels=1, segment_s=0.5, sample_rate=RATE):
        super().__init__()
        self.channels, self.segment_s, self.sample_rate = channels, segment_s, sample_rate
        self.shapes = []

    def forward(self, mixture):
        self.shapes.append(tuple(mixture.shape))
        return mixture


class Filter(Identity):
    """A fixed random convolution over 0.1 s on both sides."""

    kernel = torch.randn(1, 1, 3201, generator=torch.Generator().manual_seed(0))

    def forward(self, mixture):
        return torch.nn.functional.conv1d(mixture, self.kernel, padding=1600)


def noise(channels, samples):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)


def error_db(estimate, expected):
    assert estimate.shape == expected.shape
    return 10 * np.log10(np.sum((estimate - expected) ** 2.0) / np.sum(expected**2.0) + 1e-30)


@pytest.mark.parametrize("samples", [1, 2, 1600, 3201, 7999, 8000, 8001, 30000])
@pytest.mark.parametrize("chunk_s", [None, 0.00001, 0.05, 0.1, 0.3, 3.0])
def test_identity_returns_its_input(samples, chunk_s):
    samples = min(samples, 4000) if chunk_s == 0.00001 else samples  # chunks of one sample
    mixture = noise(1, samples)
    estimate = separate(Identity(), mixture, RATE, chunk_s)
    assert estimate.dtype == np.float32
    assert error_db(estimate, mixture) < -100


@pytest.mark.parametrize("chunk_s", [None, 0.05, 0.07, 0.3, 3.0])
def test_filter_is_the_same_for_any_chunk(chunk_s):
    mixture, model = noise(1, 20001), Filter()
    expected = model(torch.from_numpy(mixture)[None])[0].numpy()
    assert error_db(separate(model, mixture, RATE, chunk_s), expected) < -80


@pytest.mark.parametrize(
    "samples, windows", [(1, 1), (7999, 1), (8000, 1), (8001, 2), (11600, 2), (11601, 3)]
)
def test_window_is_a_training_segment(samples, windows):
    model = Identity()
    separate(model, noise(1, samples), RATE)
    assert model.shapes == [(1, 1, min(samples, 8000))] * windows


def test_chunks_meet_without_a_click():
    class Jumping(Identity):
        def forward(self, mixture):
            return super().forward(mixture) * (0.5 if len(self.shapes) % 2 else 1.0)

    estimate = separate(Jumping(), np.ones((1, 40000), np.float32), RATE)
    fade = 0.25 * 0.3 * RATE
    assert estimate.min() == pytest.approx(0.5) and estimate.max() == pytest.approx(1.0)
    assert np.abs(np.diff(estimate)).max() < 1.1 * 0.5 / fade


def test_edges_of_a_window_are_discarded():
    class Ringing(Identity):
        def forward(self, mixture):
            estimate = mixture.clone()
            estimate[..., :1600] = estimate[..., -1600:] = 9
            return estimate

    mixture = noise(1, 40000)
    estimate = separate(Ringing(), mixture, RATE)
    assert (estimate[:, :1600] == 9).all() and (estimate[:, -1600:] == 9).all()
    np.testing.assert_allclose(estimate[:, 1600:-1600], mixture[:, 1600:-1600], atol=1e-6)


def test_blocks_of_an_hour_need_two_windows():
    samples, rate, reads, written = 360_000, 100, [], 0

    def read(start, stop):
        reads.append((start, stop))
        return np.zeros((2, stop - start), np.float32)

    model = Identity(channels=2, segment_s=3.0, sample_rate=rate)
    for block in separated_blocks(model, read, samples, rate):
        written += block.shape[1]
        assert block.shape[0] == 2 and 0 < block.shape[1] <= 300
        assert 0 <= reads[-1][1] - written < 300 and len(reads) <= 1 + written // 100
    assert written == samples
    assert {stop - start for start, stop in reads} == {300}
    assert reads == sorted(reads) and reads[0][0] == 0 and reads[-1][1] == samples


@pytest.mark.parametrize(
    "model_channels, channels, shape",
    [(1, 2, (2, 1)), (1, 6, (6, 1)), (2, 1, (1, 2)), (2, 2, (1, 2)), (2, 3, (2, 2))],
)
def test_channels_keep_their_order(model_channels, channels, shape):
    model, mixture = Identity(model_channels), noise(channels, 20000)
    blocks = separated_blocks(model, lambda start, stop: mixture[:, start:stop], 20000, RATE)
    assert error_db(np.concatenate(list(blocks), axis=1), mixture) < -100
    assert {shape[:2] for shape in model.shapes} == {shape}


@pytest.mark.parametrize(
    "mixture, rate, words",
    [
        (np.zeros(100), RATE, "shape .100,.*channels, samples"),
        (np.zeros((1, 0)), RATE, "shape .1, 0"),
        (np.zeros((2, 100)), RATE, "channels 2, the model 1"),
        (np.zeros((1, 100)), 44100, "sample_rate 44100, the model 16000"),
        (np.full((1, 100), np.nan), RATE, "NaN"),
    ],
)
def test_wrong_mixture_is_an_error(mixture, rate, words):
    with pytest.raises(ValueError, match=words):
        separate(Identity(), mixture, rate)
    with pytest.raises(ValueError, match="chunk_s is 0"):
        separate(Identity(), noise(1, 100), RATE, chunk_s=0)


def test_training_mode_is_restored():
    class Failing(Identity):
        def forward(self, mixture):
            assert not self.training
            raise FloatingPointError

    model = Failing().train()
    with pytest.raises(FloatingPointError):
        separate(model, noise(1, 100), RATE)
    assert model.training
