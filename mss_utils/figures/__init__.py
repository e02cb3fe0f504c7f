"""Figures of the notebooks and the report, in one style; one module per notebook page.

A figure function takes tables of a run and a target, and returns its axes. `show` saves and
displays them, `save_vector` only saves them.
"""

from mss_utils.figures.analysis import attack, damaged_repeat, data_amount, hypothesis_table, phase
from mss_utils.figures.data import co_activity, curriculum, data_levels, mixing, spectrograms
from mss_utils.figures.models import (
    live_curves,
    positions,
    reconstruction,
    show_source,
    training_curves,
)
from mss_utils.figures.scores import (
    ablation_table,
    cost,
    opinion,
    overview,
    paired,
    score_table,
    scores,
    track_lines,
    trade_off,
)
from mss_utils.figures.style import (
    COLOURS,
    LABELS,
    MARKERS,
    SHORT_LABELS,
    SHOWN_METRICS,
    WIDTH,
    format_db,
    format_number,
    save_vector,
    show,
    show_diagram,
)

__all__ = ["COLOURS", "LABELS", "MARKERS", "SHORT_LABELS", "SHOWN_METRICS", "WIDTH", "attack"]
__all__ += ["ablation_table", "co_activity", "cost", "curriculum", "damaged_repeat", "data_amount"]
__all__ += ["data_levels", "format_db", "format_number", "hypothesis_table", "live_curves"]
__all__ += ["mixing", "opinion", "overview", "paired", "phase", "positions", "reconstruction"]
__all__ += ["save_vector", "score_table", "scores", "show", "show_diagram", "show_source"]
__all__ += ["spectrograms", "track_lines", "trade_off", "training_curves"]
