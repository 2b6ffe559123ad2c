"""The report in a real browser: nothing in its console, nothing wider than the screen."""

from pathlib import Path

import pytest

from agile.report import write_report
from tests.browser import Browser, find_browser
from tests.made_up import made_up_report

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# what sticks out at the right, unless it stands in a box that scrolls by itself
OUTSIDE = """[...document.querySelectorAll('main *')].filter(e =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !e.closest('.scroll, svg')
).map(e => e.tagName + '.' + e.className).slice(0, 5)"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_says_nothing(tmp_path: Path, width: int, dark: bool) -> None:
    program = find_browser()
    write_report(made_up_report(), tmp_path)
    with Browser(program) as browser:
        browser.open(tmp_path / "report.html", width, dark=dark)
        for closed in (True, False):
            assert browser.value(OVERFLOW) <= 0
            assert browser.value(OUTSIDE) == []
            if closed:
                browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.value("document.querySelectorAll('figure svg').length") > 10
        assert browser.complaints == []
