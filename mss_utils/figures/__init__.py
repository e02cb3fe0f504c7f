"""Figures of the notebooks and the report, in one style; one module per notebook page.

A figure function takes tables of a run and a target, and returns its axes. `show` saves and
displays them, `save` only saves them.
"""

from mss_utils.figures.analysis import (
    attack,
    bottleneck,
    damaged_repeat,
    data_amount,
    hypothesis_table,
    phase,
)
from mss_utils.figures.data import co_activity, data_levels, mixing, spectrograms
from mss_utils.figures.models import live_curves, reconstruction, training_curves
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
    SHORT_LABELS,
    SHOWN_METRICS,
    format_db,
    format_number,
    save,
    show,
    show_diagram,
    show_source,
)
