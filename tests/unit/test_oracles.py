import pytest
import torch

from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.models.oracles import ORACLES, oracle, wiener


def random_spectra(*shape):
    generator = torch.manual_seed(0)
    return torch.randn(2, 1, *shape, dtype=torch.complex64, generator=generator)


def test_oracles_are_far_above_the_mixture(store, small_settings):
    mixture, stems = store.load(store.split("test")[0])
    target = stems[store.stem_index("piano")]
    for name in ORACLES:
        estimate = oracle(name, mixture, target, small_settings)
        assert estimate.shape == mixture.shape
        assert utterance_sdr(target.T, estimate.T) > utterance_sdr(target.T, mixture.T) + 3


@pytest.mark.parametrize("silent_from", [40, 10])  # digital silence does not weaken the filter
def test_mono_wiener_filter_is_the_power_ratio_mask(silent_from):
    spectra = random_spectra(1, 5, 40)
    spectra[0, ..., silent_from:] = 0
    powers, mixture = spectra.abs().square(), spectra.sum(dim=0)
    estimate = wiener(mixture, *spectra, bins_at_once=2)
    assert torch.allclose(estimate, powers[0] / powers.sum(dim=0) * mixture, atol=1e-3)


def test_stereo_wiener_filter_uses_the_position():
    """Separate one source on the left and one on the right that no mask could tell apart."""
    panning = torch.tensor([[1.0, 0.2], [0.2, 1.0]])  # source, channel
    left, right = random_spectra(1, 8, 50) * panning[:, None, :, None, None]
    error = wiener(left + right, left, right) - left
    assert error.abs().square().sum() < 0.02 * left.abs().square().sum()
