"""Separate mixtures by overlap-add, separate song files, and write the estimates of a run."""

from mss_utils.separation.estimates import (
    read_all_estimates,
    read_estimate,
    read_estimates,
    trained_model,
    write_estimates,
)
from mss_utils.separation.overlap_add import separate
from mss_utils.separation.song_files import separate_file

__all__ = ["read_all_estimates", "read_estimate", "read_estimates", "separate", "separate_file"]
__all__ += ["trained_model", "write_estimates"]
