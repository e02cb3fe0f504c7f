"""From a mixture to the target in it: overlap-add of chunks, song files, and the estimates of a run."""

from mss_utils.separation.estimates import (
    ESTIMATED,
    ROWS,
    read_all_estimates,
    read_estimate,
    read_estimates,
    trained_model,
    write_estimates,
)
from mss_utils.separation.overlap_add import separate, separated_blocks
from mss_utils.separation.song_files import bandwidth_note, separate_file

__all__ = [
    "ESTIMATED",
    "ROWS",
    "bandwidth_note",
    "read_all_estimates",
    "read_estimate",
    "read_estimates",
    "separate",
    "separate_file",
    "separated_blocks",
    "trained_model",
    "write_estimates",
]
