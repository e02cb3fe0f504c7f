"""Former place of `mss_utils.evaluation.bsseval`, kept for code outside the project."""

from mss_utils.evaluation.bsseval import bss_eval
