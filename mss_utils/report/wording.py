"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from mss_utils.figures import format_number

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
NUMBERS += ("seven", "eight", "nine", "ten", "eleven", "twelve")


def spell(number: int) -> str:
    """Return a small number as a word."""
    return NUMBERS[number] if number < len(NUMBERS) else f"{number:,}"


def quantity(number: int, noun: str, spelled: bool = True) -> str:
    """Return `three tracks`, or `3 tracks`."""
    text = spell(number) if spelled else f"{number:,}"
    return f"{text} {noun}{'' if number == 1 else 's'}"


def join(items: Iterable[str], separator: str = ", ") -> str:
    """Return `a, b and c`."""
    *first, last = list(items) or [""]
    return f"{separator.join(first)} and {last}" if first else last


def plain(value: Any) -> str:
    """Return a setting as text: no trailing zeros, no Python brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:.10g}"
    return argument(value or "", ", ") or "–"


def argument(value: Any, separator: str = ",") -> str:
    """Return a setting as the command line takes it."""
    if isinstance(value, dict):
        value = [f"{'+'.join(stems)}->{group}" for group, stems in value.items()]
    return separator.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def interval(row: Mapping[str, Any] | pd.Series, digits: int = 2, sign: str = "") -> str:
    """Return `[0.10, 0.20]` for ci_low and ci_high of a row; empty for NaN."""
    bounds = [row["ci_low"], row["ci_high"]]
    if np.isnan(bounds).any():
        return ""
    return f"[{', '.join(format_number(bound, digits, sign) for bound in bounds)}]"


def seconds(value: float) -> str:
    """Return a duration in s, min or h."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
