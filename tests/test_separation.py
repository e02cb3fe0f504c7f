import numpy as np
import pytest
import soundfile
import torch

from mss_utils.models import build_model
from mss_utils.separation import separate, separate_file


class Identity(torch.nn.Module):
    sample_rate, channels, segment_s, target = 16000, 1, 0.5, "piano"

    def forward(self, mixture):
        return mixture


@pytest.mark.parametrize("samples", [1, 2, 7999, 8000, 8001, 50000])
@pytest.mark.parametrize("chunk_s", [None, 0.1, 3.0])
def test_overlap_add_of_an_identity_returns_the_input(samples, chunk_s):
    mixture = np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)
    estimate = separate(Identity(), mixture, 16000, chunk_s)
    assert estimate.shape == mixture.shape and estimate.dtype == np.float32
    error = 10 * np.log10(np.sum((estimate - mixture) ** 2) / np.sum(mixture**2) + 1e-30)
    assert error < -100


@pytest.mark.parametrize("mixture, rate, words", [
    (np.zeros(100), 16000, "shape .100,.*channels, samples"),
    (np.zeros((1, 0)), 16000, "at least one sample"),
    (np.zeros((2, 100)), 16000, "channels 2.*trained with 1"),
    (np.zeros((1, 100)), 44100, "sample_rate 44100.*trained with 16000"),
    (np.full((1, 100), np.nan), 16000, "NaN"),
])
def test_a_wrong_mixture_is_named(mixture, rate, words):
    with pytest.raises(ValueError, match=words):
        separate(Identity(), mixture, rate)


def test_separating_leaves_the_model_in_its_mode(small_settings):
    model = build_model("unet", small_settings).train()
    model.segment_s = 0.5
    separate(model, np.zeros((1, 9000), np.float32), 16000)
    assert model.training


def test_target_and_residual_of_a_file_add_up(tmp_path):
    song = np.random.default_rng(0).uniform(-0.5, 0.5, (44100, 2)).astype(np.float32)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    paths = separate_file(tmp_path / "song.wav", Identity(), tmp_path / "out")
    assert [path.name for path in paths] == ["song.piano.wav", "song.residual.wav"]
    (target, rate), (residual, _) = (soundfile.read(path, dtype="float32") for path in paths)
    assert rate == 44100 and target.shape == song.shape
    np.testing.assert_allclose(target + residual, song, atol=1e-6)


def test_unreadable_songs_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        separate_file(tmp_path / "none.wav", Identity(), tmp_path)
    (tmp_path / "text.mp3").write_text("not music")
    with pytest.raises(ValueError, match="Cannot read.*text.mp3"):
        separate_file(tmp_path / "text.mp3", Identity(), tmp_path)
