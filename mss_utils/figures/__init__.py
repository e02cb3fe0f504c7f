"""Every plot of the report: axes in, axes out, one style, saved as SVG for the report and PNG for everything else.

A function that draws takes `ax` (or `axes`) and makes a figure of report width (16 cm) when it gets None. `show` is what
notebooks call: it saves under `results/<run>/figures/` and displays. A model has the same colour and marker everywhere;
colours differ in lightness too, so a grey print stays readable. Used by all notebooks.

    style.py --> data.py, architecture.py, training.py, scores.py, questions.py
"""

from mss_utils.figures.analysis import attack, data_amount, phase, reach, repeat, verdict_table
from mss_utils.figures.architecture import architecture, pipeline, positions
from mss_utils.figures.data import (
    LOWEST_HZ,
    co_activity,
    curriculum,
    data_levels,
    excerpt,
    mixing,
    spectrogram_db,
    spectrograms,
)
from mss_utils.figures.scores import (
    ablation_table,
    cost,
    opinion,
    overview,
    paired,
    score_table,
    scores,
    slopes,
    trade_off,
)
from mss_utils.figures.style import (
    COLOURS,
    LABELS,
    MARKERS,
    SHORT_LABELS,
    WIDTH,
    format_db,
    format_number,
    save,
    save_vector,
    show,
)
from mss_utils.figures.training import live_curves, reconstruction, training_curves

__all__ = [
    "COLOURS",
    "LABELS",
    "LOWEST_HZ",
    "MARKERS",
    "SHORT_LABELS",
    "WIDTH",
    "ablation_table",
    "architecture",
    "attack",
    "co_activity",
    "cost",
    "curriculum",
    "data_amount",
    "data_levels",
    "format_db",
    "excerpt",
    "live_curves",
    "mixing",
    "format_number",
    "opinion",
    "overview",
    "paired",
    "phase",
    "pipeline",
    "positions",
    "reach",
    "reconstruction",
    "repeat",
    "save",
    "save_vector",
    "score_table",
    "scores",
    "show",
    "slopes",
    "spectrogram_db",
    "spectrograms",
    "trade_off",
    "training_curves",
    "verdict_table",
]
