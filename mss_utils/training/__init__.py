"""Training: the loop, checkpoints, the monitor and the launcher of several processes."""

from mss_utils.training.loop import (
    load_history,
    middle_excerpts,
    reconstruction_check,
    train,
    train_in_this_process,
)
