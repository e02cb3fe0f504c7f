"""Measurements of phase, repetition and attack, and verdicts on hypotheses (notebook 05)."""

from mss_utils.analysis.attack import find_onsets, isolated_onsets
from mss_utils.analysis.hypotheses import format_hypothesis, repetition_gains
from mss_utils.analysis.measurements import TABLES, analyse
from mss_utils.analysis.phase import combine_magnitude_phase, whole_band_rows
from mss_utils.analysis.repetition import CONDITIONS, find_loops
from mss_utils.analysis.studies import run_ablations
