"""The section about when people are at a desk."""

from __future__ import annotations

import datetime
import re
from functools import cached_property
from zoneinfo import ZoneInfo

from pydantic import Field, model_validator

from agile.config.section import Section

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EXPECTED = "expected days and times such as {mon-fri: 09:00-12:00 13:00-17:30, sat: 10:00-13:00}"
Minutes = tuple[int, int]  # since midnight: from, until


class HoursConfig(Section):
    """Working hours by weekday, by the clock of one time zone.

    >>> hours = HoursConfig(open={"mon-fri": "09:00-17:00"}, time_zone="Europe/Berlin")
    >>> at = datetime.datetime(2026, 7, 6, 7, 30, tzinfo=datetime.UTC)  # a Monday, half past nine in Berlin
    >>> hours.are(at.timestamp()), hours.are((at + datetime.timedelta(hours=8)).timestamp())
    (True, False)
    """

    open: dict[str, str] = Field(
        description="From when until when, by day or days: {mon-fri: 09:00-12:00 13:00-17:30, sat: 10:00-13:00}. Days "
        "that are not named are free."
    )
    time_zone: str = Field("UTC", description="Whose clock: Europe/Berlin, America/New_York.")

    @model_validator(mode="after")
    def _can_be_read(self) -> HoursConfig:
        try:
            ZoneInfo(self.time_zone)
        except (OSError, KeyError, ValueError):
            raise ValueError(
                f"time_zone is {self.time_zone!r}, which this system does not know; expected a name such as UTC or "
                "Europe/Berlin (pip install tzdata brings them all)"
            ) from None
        _ = self._week
        return self

    @cached_property
    def _week(self) -> dict[int, list[Minutes]]:
        week: dict[int, list[Minutes]] = {}
        for days, times in self.open.items():
            for day in _days(days):
                week.setdefault(day, []).extend(_minutes(time) for time in times.split())
        if not any(week.values()):
            raise ValueError(f"open is {self.open!r}, {EXPECTED}")
        return week

    def are(self, at: float) -> bool:
        """Whether it is working time.

        Args:
            at: Seconds since 1970.
        """
        there = datetime.datetime.fromtimestamp(at, ZoneInfo(self.time_zone))
        minute = 60 * there.hour + there.minute
        return any(start <= minute < end for start, end in self._week.get(there.weekday(), ()))


def _days(text: str) -> range:
    first, _, last = text.strip().lower().partition("-")
    if first not in DAYS or (last or first) not in DAYS or (last and DAYS.index(last) < DAYS.index(first)):
        raise ValueError(f"open has the days {text!r}, expected one of {', '.join(DAYS)}, or two such as mon-fri")
    return range(DAYS.index(first), DAYS.index(last or first) + 1)


def _minutes(text: str) -> Minutes:
    found = re.fullmatch(r"(\d?\d):([0-5]\d)-(\d?\d):([0-5]\d)", text)
    start, end = (60 * int(found[1]) + int(found[2]), 60 * int(found[3]) + int(found[4])) if found else (0, 0)
    if not start < end <= 24 * 60:
        raise ValueError(f"open has the time {text!r}, {EXPECTED}; what goes on after midnight is two times, to 24:00")
    return start, end
