"""Scores of a separation: BSSEval v4, equal to museval 0.4.1 and many times faster, utterance SDR and SI-SDR.

BSSEval explains an estimate as the reference, plus a filtered version of the reference, plus filtered versions of all
references, plus a rest. The filters are the least-squares best of 512 taps over the whole track. With the notation

    s      the reference image of one stem
    P_s e  the estimate projected on delayed copies of s             (all channels of that stem)
    P e    the estimate projected on delayed copies of every stem

the four scores of a frame are energy ratios in decibels:

    SDR = |s|^2 / |e - s|^2              ISR = |s|^2 / |P_s e - s|^2         (spatial or filtering distortion)
    SIR = |P_s e|^2 / |P e - P_s e|^2    SAR = |P e|^2 / |e - P e|^2         (interference; artifacts)

Only ISR, SIR and SAR depend on the filters. 512 taps last 32 ms at 16 kHz and 11.6 ms at 44.1 kHz, so these three do
not compare across sample rates.

Sources: E. Vincent, R. Gribonval, C. Fevotte, "Performance measurement in blind audio source separation", IEEE TASLP
14(4), 2006; F.-R. Stoeter, A. Liutkus, N. Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018
(version 4: one filter for the whole track); the reference implementation is `museval.metrics.bss_eval`.
"""

import shutil
from collections.abc import Hashable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import irfft, next_fast_len, rfft
from scipy.linalg import lapack, toeplitz

TAPS = 512  # length of the distortion filters in BSSEval
FFT_SIZE = (
    8192  # of the correlations: large beside TAPS, small enough to stay in the processor's cache
)
METRICS = ("SDR", "ISR", "SIR", "SAR")
MAX_SCORE_DB = (
    80.0  # above this a score says no more than that it is large: it is the size of rounding noise
)


def bss_eval(references, estimates, sample_rate, window_s=1.0, hop_s=1.0):
    """BSSEval v4 scores of every stem in every frame. See `BSSEval`, which scores several estimates of one track.

    references, estimates: (stems, samples, channels), in the same order of stems.
    Returns a dict of SDR, ISR, SIR and SAR in dB, each (stems, frames) and float64.
    Raises ValueError as `BSSEval` does.
    """
    return BSSEval(references, sample_rate, window_s, hop_s).score(estimates)


class BSSEval:
    """The references of one track, prepared once to score any number of estimates of it.

        track = BSSEval(references, sample_rate=16000)
        scores = {name: track.score(estimates) for name, estimates in models.items()}

    references: (stems, samples, channels). Window and hop are in seconds and cut down to whole samples; a trailing part
    of a window is not scored, but it does take part in the filters. A track shorter than a window is one frame.

    Equal to `museval.metrics.bss_eval(references, estimates, window, hop, compute_permutation=False, filters_len=512,
    framewise_filters=False, bsseval_sources_version=False)`, except where museval raises:

    - A frame in which any reference or any estimate is silent has no score: NaN for all its stems, as in museval.
      Silent means that the channels add up to zero at every sample, so left = -right counts as silent too.
    - A reference or an estimate that is silent throughout makes every frame such a frame: all NaN (museval raises).
      `score_track` has a rule that loses less.
    - A perfect estimate has an SDR of inf, as in museval; its ISR, SIR and SAR are rounding noise near 300 dB.
      Above about 80 dB no filter score says more than that it is large.
    - Of identical channels (left = right in a stem, or two identical references) the first does for all: the projection is the
      same, and the normal equations are not singular (museval gets past that by its rounding, or stops with an
      AttributeError under numpy 2). A track with left = right in references and estimates scores as its mono version.

    Do not read SIR and SAR where the references have a band that is empty beyond about -100 dB and the estimate has not:
    the filters then amplify rounding noise, and museval's own SIR changes with the order of the stems. References that
    have been through 16 bits are safe, the rounding fills the band.

    Raises ValueError for a wrong shape, NaN or infinite samples, or a window or hop below one sample.
    """

    def __init__(self, references, sample_rate, window_s=1.0, hop_s=1.0):
        references = _checked(references, "references", ("stems", "samples", "channels"))
        self.shape = references.shape
        self.window, self.hop = _frame_sizes(self.shape[1], sample_rate, window_s, hop_s)
        self.silent = _silent_frames(references, self.window, self.hop).any(axis=0)  # (frames,)
        self.references = np.ascontiguousarray(
            references.swapaxes(1, 2)
        )  # (stems, channels, samples)
        rows = self.references.reshape(-1, self.shape[1])  # (stems * channels, samples)
        correlations = _correlate(rows, rows)
        # The slow part, shared by all estimates: one factorisation for all stems together, one for each stem alone.
        self.project_on_all = _least_squares(correlations, _twins(rows))
        self.project_on_own = [
            _least_squares(correlations[own, own], _twins(rows[own])) for own in self._stem_rows()
        ]

    def score(self, estimates, stems=None):
        """SDR, ISR, SIR and SAR in dB, each (stems, frames), of estimates (stems, samples, channels).

        With `stems`, a list of indices, the estimates are of these stems only, in this order, and so are the scores.
        Raises ValueError if the estimates do not have the shape of the references or hold NaN or infinite samples.
        """
        estimates = _checked(estimates, "estimates", ("stems", "samples", "channels"))
        stems = list(range(self.shape[0])) if stems is None else stems
        _check_same_shape((len(stems), *self.shape[1:]), estimates.shape)
        silent = self.silent | _silent_frames(estimates, self.window, self.hop).any(axis=0)
        estimates = np.ascontiguousarray(estimates.swapaxes(1, 2))  # (stems, channels, samples)

        scores = np.full((len(METRICS), len(stems), len(silent)), np.nan)
        if not silent.all():
            own, every = self._filters(estimates, stems)
            for frame in np.flatnonzero(~silent):
                part = np.s_[..., frame * self.hop : frame * self.hop + self.window]
                scores[:, :, frame] = _frame_scores(
                    self.references[part], estimates[part], stems, own, every
                )
        return dict(zip(METRICS, scores))

    def _filters(self, estimates, stems):
        """Frequency responses of the projections on the own stem and on all stems.

        Returns own (channels of the reference, stems, channels, bins) and every (all rows, stems, channels, bins).
        """
        _, n_channels, n_samples = estimates.shape
        products = _correlate(
            self.references.reshape(-1, n_samples), estimates.reshape(-1, n_samples)
        )
        every = self.project_on_all(products)  # (rows, estimate rows, taps)
        rows = self._stem_rows()
        # Each estimate on its own reference: with estimates of all stems, the blocks on the diagonal.
        own = [
            self.project_on_own[stem](products[rows[stem], rows[place]])
            for place, stem in enumerate(stems)
        ]
        own = np.stack(own, axis=1)  # (channels, stems, channels, taps)
        every = every.reshape(-1, len(stems), n_channels, TAPS)
        n_fft = _frame_fft_size(self.window)
        return rfft(own, n_fft), rfft(every, n_fft)

    def _stem_rows(self):
        """The slice of rows that belongs to each stem."""
        n_stems, _, n_channels = self.shape
        return [slice(stem * n_channels, (stem + 1) * n_channels) for stem in range(n_stems)]


class MusevalScorer:
    """museval itself behind the interface of `BSSEval`, to check the numbers by: the referee.

    Where museval raises all scores are NaN: a reference or an estimate that is silent throughout, and normal equations that
    are exactly singular (an AttributeError under numpy 2). Raises ValueError as `BSSEval` does, FileNotFoundError where
    museval cannot be imported.
    """

    def __init__(self, references, sample_rate, window_s=1.0, hop_s=1.0):
        if not museval_is_available():
            raise FileNotFoundError(
                "museval needs ffmpeg and ffprobe on the PATH; install them (apt-get install ffmpeg), or set scorer=bss_eval."
            )
        self.references = _checked(references, "references", ("stems", "samples", "channels"))
        self.window, self.hop = _frame_sizes(self.references.shape[1], sample_rate, window_s, hop_s)

    def score(self, estimates, stems=None):
        """As `BSSEval.score`; museval is asked for all stems, with the reference in the place of an estimate that is not there."""
        from museval.metrics import bss_eval as museval_bss_eval

        estimates = _checked(estimates, "estimates", ("stems", "samples", "channels"))
        stems = list(range(len(self.references))) if stems is None else stems
        _check_same_shape((len(stems), *self.references.shape[1:]), estimates.shape)
        everything = self.references.copy()
        everything[stems] = estimates
        silent = _silent_frames(
            np.concatenate([self.references, everything]), self.window, self.hop
        )  # (signals, frames)
        scores = np.full((len(METRICS), len(self.references), silent.shape[1]), np.nan)
        if not silent.all(axis=1).any():
            try:
                scores = museval_bss_eval(
                    self.references, everything, window=self.window, hop=self.hop
                )[: len(METRICS)]
            except AttributeError as error:
                if (
                    error.name != "linalg"
                ):  # numpy.linalg.linalg, where museval looks for the error of a singular matrix
                    raise
        return {metric: values[stems] for metric, values in zip(METRICS, scores)}


def museval_is_available() -> bool:
    """Whether museval can be imported here: it wants ffmpeg and ffprobe, which nothing else needs once tracks are decoded."""
    return bool(shutil.which("ffmpeg") and shutil.which("ffprobe"))


SCORERS = {"bss_eval": BSSEval, "museval": MusevalScorer}


def score_track(
    references, estimates: Mapping[Hashable, np.ndarray], sample_rate, scorer="bss_eval"
) -> dict[Hashable, dict]:
    """All scores of several estimates of one track, by the rules below for what BSSEval has no score for.

    references, and each of the estimates: (stems, samples, channels). Returns for each of the estimates a dict of SDR, ISR,
    SIR and SAR, (stems, frames); of utterance_SDR and SI_SDR, (stems,); and of silent, two bool arrays (stems, frames): in
    which frames the reference and in which the estimate of a stem is silent.

    Silent means, as in museval, that the channels add up to zero at every sample.

    - A stem that is silent throughout has no score in BSSEval. The others are scored as if it were not there: there is nothing in it
      that could interfere.
    - An estimate that is silent throughout has no score in BSSEval; its utterance SDR is 0 dB if it is all zeros. The
      estimates of other stems are scored as usual.
    - A frame in which another reference or another estimate is silent has no score for any stem, as in museval.
    - A track shorter than a second is scored as one frame, as in museval.

    Raises ValueError as `BSSEval` does, naming the estimate; KeyError for a scorer that is not in `SCORERS`.
    """
    references = _checked(references, "references", ("stems", "samples", "channels"))
    heard = [stem for stem, signal in enumerate(references) if _sounds(signal)]
    prepared = SCORERS[scorer](references[heard], sample_rate) if heard else None
    frames = _frame_sizes(references.shape[1], sample_rate, 1.0, 1.0)
    silent = _silent_frames(references, *frames)
    found = {}
    for name, signals in estimates.items():
        try:
            signals = _checked(signals, "estimates", ("stems", "samples", "channels"))
            _check_same_shape(references.shape, signals.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        scored = [stem for stem in heard if _sounds(signals[stem])]
        scores = np.full((len(METRICS), *silent.shape), np.nan)
        if scored:
            few = prepared.score(signals[scored], [heard.index(stem) for stem in scored])
            scores[:, scored] = np.stack([few[metric] for metric in METRICS])
        whole = {
            metric: np.array(list(map(score, references, signals)))
            for metric, score in WHOLE_TRACK.items()
        }
        found[name] = (
            dict(zip(METRICS, scores))
            | whole
            | dict(silent=(silent, _silent_frames(signals, *frames)))
        )
    return found


def disagreement(ours, theirs):
    """How far two programs are apart in scores of the same shape, in dB.

    Returns how many scores at least one of them has below `MAX_SCORE_DB`, the largest difference between these (NaN if there
    is none), how many differ by more than 1e-4 dB, and how many are missing in one of the two only.
    """
    both = ~(np.isnan(ours) | np.isnan(theirs)) & ((ours < MAX_SCORE_DB) | (theirs < MAX_SCORE_DB))
    apart = np.abs(ours[both] - theirs[both])
    unequal = np.count_nonzero(np.isnan(ours) != np.isnan(theirs))
    return len(apart), max(apart, default=np.nan), np.count_nonzero(apart > 1e-4), unequal


def utterance_sdr(reference, estimate):
    """Signal-to-distortion ratio over the whole signal in dB: 10 log10(sum s^2 / sum (s - e)^2).

    reference, estimate: (samples, channels). Returns a float: NaN for a silent reference, inf for a perfect estimate,
    0 for a silent estimate. Raises ValueError for a wrong or different shape and for NaN or infinite samples.
    Source: Y. Mitsufuji et al., "Music Demixing Challenge 2021", Frontiers in Signal Processing 1, 2022, which adds a
    small constant to both sums; we do not.
    """
    reference, estimate = _checked_pair(reference, estimate)
    if not reference.any():
        return float("nan")
    return float(_db(np.sum(reference**2), np.sum((reference - estimate) ** 2)))


def si_sdr(reference, estimate):
    """Scale-invariant SDR over the whole signal in dB: 10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2.

    reference, estimate: (samples, channels), one scale for all channels, means are left in. Returns a float: NaN for a
    silent reference or a silent estimate, inf for a perfect estimate (a scaled copy comes to inf or, where the scale
    rounds, about 300 dB), -inf for an estimate orthogonal to the reference.
    Raises ValueError for a wrong or different shape and for NaN or infinite samples.
    Source: J. Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019.
    """
    reference, estimate = _checked_pair(reference, estimate)
    if not reference.any() or not estimate.any():
        return float("nan")
    target = np.sum(estimate * reference) / np.sum(reference**2) * reference
    return float(_db(np.sum(target**2), np.sum((target - estimate) ** 2)))


WHOLE_TRACK = {"utterance_SDR": utterance_sdr, "SI_SDR": si_sdr}
TRACK_METRICS = (*METRICS, *WHOLE_TRACK)  # what a track has a value of


def _correlate(first, second):
    """Products <first delayed by l, second> for l = 0 ... TAPS - 1: (a, samples), (b, samples) -> (a, b, TAPS).

    Block by block: a block of `first` meets the same stretch of `second` and TAPS - 1 samples more, so nothing wraps
    around, the spectra add up, and one inverse transform at the end does for all blocks.
    """
    step = FFT_SIZE - TAPS + 1
    total = np.zeros((len(first), len(second), FFT_SIZE // 2 + 1), dtype=complex)
    for start in range(0, first.shape[-1], step):
        block = rfft(first[:, start : start + step], FFT_SIZE)
        total += block.conj()[:, None] * rfft(second[:, start : start + FFT_SIZE], FFT_SIZE)
    return irfft(total, FFT_SIZE)[..., :TAPS]


def _twins(rows):
    """For every row of (rows, samples), whether an earlier one is identical: (rows,)."""
    energies = np.einsum("rn,rn->r", rows, rows)
    same = lambda i, j: np.isclose(energies[i], energies[j]) and np.array_equal(rows[i], rows[j])
    return np.array([any(same(i, j) for j in range(i)) for i in range(len(rows))])


def _least_squares(correlations, twin):
    """The solver of the normal equations for the best filters, factorised once.

    correlations: (rows, rows, TAPS) of the references; twin: (rows,), those that `_twins` finds get no filter. Returns a
    function from the products of references and estimates, (rows, estimates, TAPS), to filters of the same shape.
    """
    kept = np.flatnonzero(~twin)
    gram = np.block(
        [[toeplitz(correlations[i, j], correlations[j, i]) for j in kept] for i in kept]
    )
    diagonal, eps = np.s_[:: len(gram) + 1], np.finfo(float).eps
    gram.flat[diagonal] += eps  # as museval does
    # LU like museval, although Cholesky would take half the time: stems that were coded lossily have empty bands, and
    # their Gram matrix is not positive definite within rounding.
    lu, pivots, zero_pivot = lapack.dgetrf(gram)
    if zero_pivot:  # one channel is a multiple of another: a ridge just above rounding changes a score by less than 1e-4 dB
        gram.flat[diagonal] += 64 * eps * gram.max()
        lu, pivots, _ = lapack.dgetrf(gram)

    def solve(products):
        right = products[kept].swapaxes(1, 2).reshape(len(gram), -1)  # (rows * taps, estimates)
        filters = np.zeros_like(products)
        filters[kept] = (
            lapack.dgetrs(lu, pivots, right)[0].reshape(len(kept), TAPS, -1).swapaxes(1, 2)
        )
        return filters

    return solve


def _frame_scores(references, estimates, stems, own_filters, every_filter):
    """The four scores of one frame: references and estimates (stems, channels, window) -> (4, stems of the estimates).

    The frame is cut out before it is filtered, so the tails of the filters count (museval does the same). They fit into
    the transform, hence every energy can be summed over the bins and no signal is ever transformed back.
    """
    n_fft = _frame_fft_size(references.shape[-1])
    s, e = rfft(references, n_fft), rfft(estimates, n_fft)  # (stems, channels, bins)
    every = sum(h * row for h, row in zip(every_filter, s.reshape(-1, s.shape[-1])))  # P e
    s, references = s[stems], references[stems]
    own = sum(h * s[:, c, None] for c, h in enumerate(own_filters))  # P_s e
    true = np.sum(references**2, axis=(1, 2))
    return np.stack(
        [
            _db(true, np.sum((estimates - references) ** 2, axis=(1, 2))),
            _db(true, _energy(own - s, n_fft)),
            _db(_energy(own, n_fft), _energy(every - own, n_fft)),
            _db(_energy(every, n_fft), _energy(e - every, n_fft)),
        ]
    )


def _frame_fft_size(window):
    """Room for a window and the tail of its filters."""
    return next_fast_len(window + TAPS - 1, real=True)


def _energy(spectrum, n_fft):
    """Energies of the signals behind half spectra, by Parseval: (stems, channels, bins) -> (stems,)."""
    power = np.sum(spectrum.real**2 + spectrum.imag**2, axis=1)  # (stems, bins)
    # Every bin but the first (and the last, of an even transform) stands for a pair.
    once = power[:, 0] + (power[:, -1] if n_fft % 2 == 0 else 0)
    return (2 * power.sum(axis=1) - once) / n_fft


def _db(numerator, denominator):
    """10 log10 of a ratio; inf where the denominator is zero, -inf where only the numerator is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.inf, 10 * np.log10(np.divide(numerator, denominator)))


def _checked(signal, name, axes):
    """The signal as float64, or a ValueError if it does not have these axes or holds NaN or infinite samples."""
    signal = np.asarray(signal, dtype=np.float64)
    if signal.ndim != len(axes) or 0 in signal.shape:
        raise ValueError(
            f"{name} have shape {signal.shape}; expected ({', '.join(axes)}), none of them empty. "
            "Mono needs its channel axis too: signal[..., None]."
        )
    if not np.isfinite(signal).all():
        bad = np.count_nonzero(~np.isfinite(signal))
        raise ValueError(
            f"{name} hold {bad} NaN or infinite samples of {signal.size}; expected finite numbers. "
            "Look for a diverged model or a damaged file."
        )
    return signal


def _checked_pair(reference, estimate):
    """Both signals as float64 (samples, channels) of one shape, or a ValueError."""
    reference = _checked(reference, "reference samples", ("samples", "channels"))
    estimate = _checked(estimate, "estimate samples", ("samples", "channels"))
    _check_same_shape(reference.shape, estimate.shape)
    return reference, estimate


def _check_same_shape(references, estimates):
    if references != estimates:
        raise ValueError(
            f"the estimates have shape {estimates}; expected that of the references, {references}. "
            "Trim or pad the estimates to the length of the track and keep its channels and order of stems."
        )


def _frame_sizes(n_samples, sample_rate, window_s, hop_s):
    """Window and hop in samples; a window is at most as long as the track. ValueError if one of them is below a sample."""
    window, hop = int(window_s * sample_rate), int(hop_s * sample_rate)
    if window < 1 or hop < 1:
        raise ValueError(
            f"a window of {window} and a hop of {hop} samples at {sample_rate} Hz; expected at least one sample each. "
            "Give window_s and hop_s in seconds and the sample rate in Hz."
        )
    return min(window, n_samples), hop


def _silent_frames(signals, window, hop):
    """In which frames each of the signals (stems, samples, channels) is silent, as museval defines it: (stems, frames)."""
    zero = signals.sum(axis=-1) == 0  # (stems, samples)
    return sliding_window_view(zero, window, axis=-1)[:, ::hop].all(axis=-1)


def _sounds(signal):
    """Whether (samples, channels) is not silent throughout, as museval defines it."""
    return bool(signal.sum(axis=-1).any())
