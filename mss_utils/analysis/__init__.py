"""Measurements of phase, repetition and attack, and verdicts on hypotheses (notebook 05)."""

from mss_utils.analysis.attack import find_onsets, isolated_onsets
from mss_utils.analysis.hypotheses import (
    format_hypothesis,
    hypothesis_rows,
    pivot_by_seed,
    repetition_gains,
)
from mss_utils.analysis.measurements import TABLES, analyse
from mss_utils.analysis.phase import combine_magnitude_phase, whole_band_rows
from mss_utils.analysis.repetition import CONDITIONS, LAGS_S, find_loops
from mss_utils.analysis.studies import data_gains, run_ablations

__all__ = ["CONDITIONS", "LAGS_S", "TABLES", "analyse", "combine_magnitude_phase", "data_gains"]
__all__ += ["find_loops", "find_onsets", "format_hypothesis", "hypothesis_rows", "isolated_onsets"]
__all__ += ["pivot_by_seed", "repetition_gains", "run_ablations", "whole_band_rows"]
