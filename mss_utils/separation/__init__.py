"""Separate mixtures by overlap-add, separate song files, and write the estimates of a run."""

from mss_utils.separation.estimates import (
    read_all_estimates,
    read_estimate,
    read_estimates,
    trained_model,
    write_estimates,
)
from mss_utils.separation.overlap_add import separate
from mss_utils.separation.song_files import bandwidth_note, separate_file

__all__ = [
    "bandwidth_note",
    "read_all_estimates",
    "read_estimate",
    "read_estimates",
    "separate",
    "separate_file",
    "trained_model",
    "write_estimates",
]
