"""BSSEval v4 scores as museval 0.4.1 computes them, many times faster; utterance SDR and SI-SDR.

With the true stem s, its estimate e, and filters of 512 taps fitted over the whole track:

    P_s e  projection of e on delayed copies of s (all channels of that stem)
    P e    projection of e on delayed copies of every stem

    SDR = |s|^2 / |e - s|^2              ISR = |s|^2 / |P_s e - s|^2         (spatial distortion)
    SIR = |P_s e|^2 / |P e - P_s e|^2    SAR = |P e|^2 / |e - P e|^2         (artifacts)

in dB in each frame. 512 taps last 32 ms at 16 kHz and 11.6 ms at 44.1 kHz: ISR, SIR and SAR do
not compare across sample rates.

Sources: E. Vincent, R. Gribonval, C. Fevotte, "Performance measurement in blind audio source
separation", IEEE TASLP 14(4), 2006; F.-R. Stoeter, A. Liutkus, N. Ito, "The 2018 Signal Separation
Evaluation Campaign", LVA/ICA 2018; the reference implementation `museval.metrics.bss_eval`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

import numpy as np
from numpy.fft import irfft, rfft
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import next_fast_len
from scipy.linalg import get_lapack_funcs, toeplitz

TAPS = 512  # length of the distortion filters
FFT_SIZE = 8192  # of the correlations: much longer than TAPS, yet it fits the processor's cache
METRICS = ("SDR", "ISR", "SIR", "SAR")
MAX_SCORE_DB = 80.0  # higher scores are rounding noise
Scores = dict[str, np.ndarray]


def bss_eval(
    references: np.ndarray,
    estimates: np.ndarray,
    sample_rate: int,
    window_s: float = 1.0,
    hop_s: float = 1.0,
) -> Scores:
    """Compute the BSSEval v4 scores of every stem in every frame.

    Parameters
    ----------
    references, estimates : np.ndarray, shape (stems, samples, channels)
        True and estimated stems in the same order.
    sample_rate : int
        Hz.
    window_s, hop_s : float
        Length and distance of frames in seconds.

    Returns
    -------
    dict of np.ndarray, shape (stems, frames), float64
        SDR, ISR, SIR and SAR in dB; NaN where museval has NaN, see `BSSEval`.

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinite samples, or a frame shorter than one sample.
    """
    return BSSEval(references, sample_rate, window_s, hop_s).score(estimates)


class BSSEval:
    """Score any number of estimates of one track; what they share is computed once.

    Equal to `museval.metrics.bss_eval` where that does not raise. A frame in which a reference or
    an estimate is silent (its channels add up to zero) is NaN for all stems; if one is silent
    throughout, all frames are. A perfect estimate has an SDR of inf. Of identical channels only the
    first is used: left = right scores as mono. A track shorter than a window is one frame.
    Parameters are those of `bss_eval`.
    """

    def __init__(
        self, references: np.ndarray, sample_rate: int, window_s: float = 1.0, hop_s: float = 1.0
    ) -> None:
        references = _checked(references, "references")
        n_stems, n_samples, n_channels = self.shape = references.shape
        self.window, self.hop = _frame_sizes(n_samples, sample_rate, window_s, hop_s)
        self.n_fft = next_fast_len(self.window + TAPS - 1, True) or 0  # frame and filter tail
        self.silent = _silent_frames(references, self.window, self.hop)  # (stems, frames)
        self.references = np.ascontiguousarray(references.swapaxes(1, 2))
        self.rows = self.references.reshape(-1, n_samples)  # (stems * channels, samples)
        self.own_rows = [slice(i * n_channels, (i + 1) * n_channels) for i in range(n_stems)]
        correlations = _correlate(self.rows, self.rows)
        self.project_on_all = _least_squares(correlations, self.rows)
        self.project_on_own = [
            _least_squares(correlations[own, own], self.rows[own]) for own in self.own_rows
        ]

    def score(self, estimates: np.ndarray) -> Scores:
        """Score estimates of all stems, shape (stems, samples, channels), as `bss_eval` does."""
        estimates = _checked(estimates, "estimates", self.shape)
        silent = np.concatenate([self.silent, _silent_frames(estimates, self.window, self.hop)])
        scores = np.full((len(METRICS), len(estimates), silent.shape[1]), np.nan)
        estimates = np.ascontiguousarray(estimates.swapaxes(1, 2))
        products = _correlate(self.rows, estimates.reshape(-1, self.shape[1]))
        projections = zip(self.project_on_own, self.own_rows, strict=True)
        own = np.stack([project(products[rows, rows]) for project, rows in projections], axis=1)
        own = rfft(own, self.n_fft)  # (channels, stems, channels, bins)
        every = self.project_on_all(products).reshape(-1, *own.shape[1:3], TAPS)
        every = rfft(every, self.n_fft)  # (rows, stems, channels, bins)
        for i in np.flatnonzero(~silent.any(axis=0)):
            scores[:, :, i] = self._frame_scores(int(i) * self.hop, estimates, own, every)
        return dict(zip(METRICS, scores, strict=True))

    def _frame_scores(
        self, start: int, estimates: np.ndarray, filters_own: np.ndarray, filters_all: np.ndarray
    ) -> list[np.ndarray]:
        """Scores of one frame of estimates (stems, channels, samples): four arrays (stems,).

        As in museval the frame is cut out before it is filtered, so the tails of the filters
        count. They fit into the transform: energies are sums over bins, no inverse is needed.
        """
        frame = np.s_[..., start : start + self.window]
        references, estimates = self.references[frame], estimates[frame]
        s, e = rfft(references, self.n_fft), rfft(estimates, self.n_fft)  # (stems, channels, bins)
        every, own = np.zeros_like(e), np.zeros_like(e)
        for filters, row in zip(filters_all, s.reshape(-1, s.shape[-1]), strict=True):
            every += filters * row  # P e
        for channel, filters in enumerate(filters_own):
            own += filters * s[:, channel, None]  # P_s e
        true = np.sum(references**2, axis=(1, 2))
        return [
            _db(true, np.sum((estimates - references) ** 2, axis=(1, 2))),
            _db(true, _energy(own - s, self.n_fft)),
            _db(_energy(own, self.n_fft), _energy(every - own, self.n_fft)),
            _db(_energy(every, self.n_fft), _energy(e - every, self.n_fft)),
        ]


class MusevalScorer:
    """museval itself with the interface of `BSSEval`, to cross-check the scores.

    All scores are NaN where museval raises: a signal is silent throughout, or the normal equations
    are singular. Raises FileNotFoundError without ffmpeg, which museval needs to be imported.
    """

    def __init__(self, references: np.ndarray, sample_rate: int) -> None:
        if not museval_is_available():
            raise FileNotFoundError("museval needs ffmpeg: install it, or set scorer=bss_eval.")
        self.references = np.asarray(references, np.float64)
        self.frame_sizes = min(sample_rate, references.shape[1]), sample_rate

    def score(self, estimates: np.ndarray) -> Scores:
        """Score as `BSSEval.score` does."""
        from museval import metrics

        try:
            scores = metrics.bss_eval(self.references, estimates, *self.frame_sizes)[:4]
        except (ValueError, AttributeError):  # silent; singular (museval looks for an old name)
            frames = _silent_frames(self.references, *self.frame_sizes)
            scores = np.full((len(METRICS), *frames.shape), np.nan)
        return dict(zip(METRICS, scores, strict=True))


def museval_is_available() -> bool:
    """Return whether museval can be imported: it needs ffmpeg and ffprobe."""
    return bool(shutil.which("ffmpeg") and shutil.which("ffprobe"))


SCORERS = {"bss_eval": BSSEval, "museval": MusevalScorer}


def score_track(
    references: np.ndarray, estimates: Mapping, sample_rate: int, scorer: str = "bss_eval"
) -> dict[str, dict]:
    """Compute all scores of several estimates of one track.

    A stem whose reference or estimate is silent throughout has no BSSEval scores; the other stems
    are scored without it.

    Parameters
    ----------
    references, and each of the estimates : np.ndarray, shape (stems, samples, channels)
    scorer : one of `SCORERS`

    Returns
    -------
    dict of name to dict
        SDR, ISR, SIR and SAR (stems, frames); utterance_SDR and SI_SDR (stems,); silent, two bool
        arrays (stems, frames): silent references and silent estimates.
    """
    references = _checked(references, "references")
    audible = references.sum(axis=-1).any(axis=-1)  # (stems,)
    prepared = SCORERS[scorer](references[audible], sample_rate) if audible.any() else None
    frames = _frame_sizes(references.shape[1], sample_rate, 1.0, 1.0)
    silent = _silent_frames(references, *frames)
    results = {}
    for name, signals in estimates.items():
        signals = _checked(signals, f"{name}: estimates", references.shape)
        scores = np.full((len(METRICS), *silent.shape), np.nan)
        scored = audible & signals.sum(axis=-1).any(axis=-1)
        if prepared and scored.any():
            # References stand for silent estimates: the scores of other stems do not change.
            filled = np.where(scored[:, None, None], signals, references)
            scores[:, audible] = list(prepared.score(filled[audible]).values())
            scores[:, ~scored] = np.nan
        results[name] = dict(zip(METRICS, scores, strict=True))
        results[name]["silent"] = silent, _silent_frames(signals, *frames)
        for metric, compute in WHOLE_TRACK.items():
            results[name][metric] = np.array(list(map(compute, references, signals)))
    return results


def disagreement(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, float, int]:
    """Compare scores of two programs, arrays of one shape in dB.

    Returns how many are below `MAX_SCORE_DB` in at least one program, the largest difference of
    these (NaN if there are none), and how many are NaN in only one program.
    """
    exact = np.minimum(ours, theirs) < MAX_SCORE_DB  # false where one is NaN
    differences = np.abs(ours[exact] - theirs[exact])
    unequal_nan = int(np.count_nonzero(np.isnan(ours) != np.isnan(theirs)))
    return len(differences), float(max(differences, default=np.nan)), unequal_nan


def utterance_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the SDR of a whole signal in dB, 10 log10(sum s^2 / sum (s - e)^2).

    Y. Mitsufuji et al., "Music Demixing Challenge 2021", Frontiers in Signal Processing 1, 2022.
    Signals have the shape (samples, channels). The SDR is NaN for a silent reference, inf for a
    perfect estimate, and 0 for an estimate of zeros.
    """
    reference = _checked(reference, "reference samples", ndim=2)
    estimate = _checked(estimate, "estimate samples", reference.shape, ndim=2)
    if not reference.any():
        return float("nan")
    return float(_db(np.sum(reference**2), np.sum((reference - estimate) ** 2)))


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the scale-invariant SDR of a whole signal in dB, with one scale for all channels.

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2. J. Le Roux et al., "SDR - half-baked
    or well done?", ICASSP 2019. Means are not removed. Signals have the shape (samples, channels);
    the score is NaN if one of them is silent, and inf or about 300 for a scaled copy.
    """
    reference = _checked(reference, "reference samples", ndim=2)
    estimate = _checked(estimate, "estimate samples", reference.shape, ndim=2)
    if not reference.any() or not estimate.any():
        return float("nan")
    target = np.sum(estimate * reference) / np.sum(reference**2) * reference
    return float(_db(np.sum(target**2), np.sum((target - estimate) ** 2)))


WHOLE_TRACK = {"utterance_SDR": utterance_sdr, "SI_SDR": si_sdr}
TRACK_METRICS = (*METRICS, *WHOLE_TRACK)


def _correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Products <first delayed by l, second>, l < TAPS: (a, samples), (b, samples) -> (a, b, TAPS).

    A block of `first` meets the same samples of `second` and TAPS - 1 more, so that nothing wraps
    around; the spectra of all blocks are added and transformed back once.
    """
    step = FFT_SIZE - TAPS + 1
    total = np.zeros((len(first), len(second), FFT_SIZE // 2 + 1), dtype=complex)
    for start in range(0, first.shape[-1], step):
        block = rfft(first[:, start : start + step], FFT_SIZE)
        total += block.conj()[:, None] * rfft(second[:, start : start + FFT_SIZE], FFT_SIZE)
    return irfft(total, FFT_SIZE)[..., :TAPS]


def _least_squares(correlations: np.ndarray, rows: np.ndarray) -> Callable:
    """Factorise the normal equations for the best filters.

    Takes the references, (rows, samples), and their correlations, (rows, rows, TAPS). Returns a
    function from products of references and estimates, (rows, estimates, TAPS), to filters. A row
    that equals an earlier one gets no filter.
    """
    same = [any(np.array_equal(row, other) for other in rows[:i]) for i, row in enumerate(rows)]
    kept = np.flatnonzero(~np.array(same))
    blocks = [[toeplitz(correlations[i, j], correlations[j, i]) for j in kept] for i in kept]
    gram = np.block(blocks)
    factorise, substitute = get_lapack_funcs(("getrf", "getrs"), (gram,))
    diagonal, eps = np.s_[:: len(gram) + 1], np.finfo(float).eps
    gram.flat[diagonal] += eps  # as museval does
    # LU as in museval: lossy coding leaves empty bands, where Cholesky fails by rounding.
    lu, pivots, zero_pivot = factorise(gram)
    if zero_pivot:  # one channel is a multiple of another: a ridge changes scores by < 1e-4 dB
        gram.flat[diagonal] += 64 * eps * gram.max()
        lu, pivots, _ = factorise(gram)

    def solve(products: np.ndarray) -> np.ndarray:
        right = products[kept].swapaxes(1, 2).reshape(len(gram), -1)  # (rows * taps, estimates)
        solution = substitute(lu, pivots, right)[0]
        filters = np.zeros_like(products)
        filters[kept] = solution.reshape(len(kept), TAPS, -1).swapaxes(1, 2)
        return filters

    return solve


def _energy(spectrum: np.ndarray, n_fft: int) -> np.ndarray:
    """Energies of signals from half spectra (Parseval): (stems, channels, bins) -> (stems,)."""
    power = np.sum(np.real(spectrum) ** 2 + np.imag(spectrum) ** 2, axis=1)  # (stems, bins)
    # Every bin counts twice, except the first and, if n_fft is even, the last.
    once = power[:, 0] + (power[:, -1] if n_fft % 2 == 0 else 0)
    return (2 * power.sum(axis=1) - once) / n_fft


def _db(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """10 log10 of a ratio: inf where the denominator is 0, else -inf where the numerator is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.inf, 10 * np.log10(np.divide(numerator, denominator)))


def _checked(signal: np.ndarray, name: str, shape: tuple = (), ndim: int = 3) -> np.ndarray:
    """Convert to float64; raise ValueError for a wrong shape, NaN or infinite samples."""
    signal = np.asarray(signal, dtype=np.float64)
    if signal.ndim != ndim or 0 in signal.shape or (shape and signal.shape != shape):
        expected = shape or ("stems", "samples", "channels")[-ndim:]
        raise ValueError(f"{name} have shape {signal.shape}; expected {expected}, none empty.")
    if bad := np.count_nonzero(~np.isfinite(signal)):
        raise ValueError(f"{name} hold {bad} NaN or infinite samples: did the model diverge?")
    return signal


def _frame_sizes(samples: int, rate: int, window_s: float, hop_s: float) -> tuple[int, int]:
    """Window and hop in samples; a window is at most as long as the track."""
    window, hop = int(window_s * rate), int(hop_s * rate)
    if window < 1 or hop < 1:
        raise ValueError(f"window {window} and hop {hop} samples; expected at least 1 each.")
    return min(window, samples), hop


def _silent_frames(signals: np.ndarray, window: int, hop: int) -> np.ndarray:
    """Frames in which the channels of (stems, samples, channels) cancel: (stems, frames) bool."""
    zero = signals.sum(axis=-1) == 0  # (stems, samples)
    return np.all(sliding_window_view(zero, window, axis=-1)[:, ::hop], axis=-1)
