"""Bottleneck, phase, repetition and attack measured, and verdicts on hypotheses (notebook 05)."""

from mss_utils.analysis.attack import find_onsets, isolated_onsets
from mss_utils.analysis.bottleneck import INTERVENTIONS
from mss_utils.analysis.hypotheses import format_hypothesis, intervention_loss, repetition_gains
from mss_utils.analysis.measurements import TABLES, analyse
from mss_utils.analysis.phase import combine_magnitude_phase, whole_band_rows
from mss_utils.analysis.repetition import CONDITIONS, find_loops
from mss_utils.analysis.studies import run_ablations
