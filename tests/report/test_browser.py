"""The report in headless Chromium, where there is one."""

import pytest

from lowcal.report.page import write_report

from .. import browser
from .synthetic import write_run

pytestmark = pytest.mark.skipif(browser.FOUND is None, reason="needs Chromium")
HOSTILE = "<script>alert(1)</script>"
NAMES = "[...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).map(row => row.cells[0].textContent)"
IS_TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        write_run(root, "sgd", seed, error=10.0 + seed, seconds=12.0, label=HOSTILE)
        write_run(root, "local", seed, error=9.0 + seed, seconds=11.0, boundary=4)
        write_run(root, "freeze", seed, error=12.0 + seed, seconds=8.0, boundary=4)
    write_run(root, HOSTILE, 0, error=float("nan"), seconds=8.0, name="hostile")
    return write_report(root).page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def click(chromium, selector, number):
    chromium.evaluate(f"document.querySelectorAll({selector!r})[{number}].click()")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_opens_without_errors_and_fits_the_window(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    assert chromium.problems == []
    assert not chromium.evaluate(IS_TOO_WIDE)
    boxes = "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect()).every(r => r.height > 100)"
    assert chromium.evaluate(boxes)


def test_a_table_that_goes_on_has_a_shadow(chromium, page):
    chromium.open(page, width=390)
    scrolls = "(box => [box.scrollWidth > box.clientWidth, getComputedStyle(box).backgroundAttachment])"
    found = chromium.evaluate(f"{scrolls}(document.querySelector('.scroll'))")
    assert found == [True, "local, scroll"]


def test_a_click_on_a_heading_sorts_and_unknown_values_stay_last(chromium, page):
    chromium.open(page)
    assert chromium.evaluate(NAMES) == ["sgd", "local", "freeze", HOSTILE]
    click(chromium, "thead button", 1)
    assert chromium.evaluate(NAMES) == ["local", "sgd", "freeze", HOSTILE]
    click(chromium, "thead button", 1)
    assert chromium.evaluate(NAMES) == ["freeze", "sgd", "local", HOSTILE]
    click(chromium, "thead button", 0)
    assert chromium.evaluate(NAMES) == ["sgd", "local", "freeze", HOSTILE]


def test_a_method_can_be_hidden(chromium, page):
    chromium.open(page)
    shown = "[...document.querySelectorAll('[id*=series-1-]')].filter(line => line.style.display !== 'none').length"
    before = chromium.evaluate(shown)
    click(chromium, "input", 1)
    assert chromium.evaluate(NAMES) == ["sgd", "freeze", HOSTILE]
    assert before > 6
    assert chromium.evaluate(shown) == 0
    click(chromium, "input", 1)
    assert chromium.evaluate(shown) == before


def test_the_value_under_the_mouse_is_shown(chromium, page):
    chromium.open(page)
    chromium.evaluate("document.querySelector('figure').scrollIntoView()")
    at = """(() => {
        const line = document.querySelector('#error-against-time-series-2-mean').getBoundingClientRect();
        return [line.right, line.bottom];
    })()"""
    chromium.mouse(*chromium.evaluate(at))
    assert chromium.evaluate("document.querySelector('.tip').textContent") == "freeze, epoch 3, 8 s: 12.5 %"
    chromium.mouse(0, 0)
    assert chromium.evaluate("document.querySelector('.tip').hidden")
