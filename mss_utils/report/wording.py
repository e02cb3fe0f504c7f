"""Numbers and lists as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

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
    if isinstance(value, dict):
        return ", ".join(f"{'+'.join(stems)}→{group}" for group, stems in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, (int, float)):
        return f"{value:.10g}"
    return str(value) if value else "–"


def interval(low: float, high: float, digits: int = 2, sign: str = "") -> str:
    """Return `[0.10, 0.20]`; empty for NaN."""
    if np.isnan([low, high]).any():
        return ""
    return f"[{format_number(low, digits, sign)}, {format_number(high, digits, sign)}]"


def seconds(value: float) -> str:
    """Return a duration in s, min or h."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
