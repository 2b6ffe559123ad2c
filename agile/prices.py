"""What advice costs in training: the same everywhere, on a schedule, or drawn for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agile.types import Stream


def priced(
    streams: Sequence[Stream],
    price: float,
    *,
    first_price: float | None,
    drawn_from: Sequence[float],
    progress: float,
    rng: np.random.Generator,
) -> list[Stream]:
    """The streams of an iteration with the price of advice in each.

    Args:
        price: Where nothing else is said, and at the end of a schedule.
        first_price: Where a schedule starts, from which the price goes straight to `price`; None for no schedule.
        drawn_from: Each stream draws one of these; none for no drawing.
        progress: Of the schedule, from 0 to 1.
    """
    if drawn_from:
        return [replace(stream, price=float(rng.choice(drawn_from))) for stream in streams]
    now = price if first_price is None else first_price + (price - first_price) * progress
    return [replace(stream, price=now) for stream in streams]
