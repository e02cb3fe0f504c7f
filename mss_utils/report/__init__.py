"""The written report of one run or of a collection of runs."""

from mss_utils.report.typesetting import build_report

__all__ = ["build_report"]
