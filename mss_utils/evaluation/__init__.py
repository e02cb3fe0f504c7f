"""Scores of the estimates: BSSEval (bsseval.py), tables (scores.py), statistics (statistics.py)."""

from mss_utils.evaluation.scores import TABLES, evaluate, score
