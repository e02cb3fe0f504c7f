"""Training: the loop (loop.py), checkpoints (checkpoints.py)."""

from mss_utils.training.loop import load_history, reconstruction_check, train, train_in_this_process

__all__ = ["load_history", "reconstruction_check", "train", "train_in_this_process"]
