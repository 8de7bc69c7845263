"""A report in Chromium: at the widths of a phone and of a desk, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.report.write import write_report
from tests.report.made import grid_runs, read_run, section_of

# Set where these tests must run: a missing browser is then a failure.
REQUIRED = "SLEEPTRAIN_BROWSER_TESTS"
PROGRAMS = ("chromium", "chromedriver")
CONTRAST = 4.5  # of text, WCAG 2.2, 1.4.3
# The luminance of a CSS color `rgb(...)`, WCAG 2.2.
LUMINANCE = """
const luminance = color => color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = luminance(getComputedStyle(document.body).backgroundColor);
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four runs, one of which has a name that would like to load a picture."""
    runs = [read_run(settings, records) for settings, records in grid_runs()]
    runs[0].folder = Path("<img src='http://127.0.0.1:9/a.png'>") / ("long" * 40)
    return write_report([section_of(*runs)], [], tmp_path_factory.mktemp("report") / "out", "A report")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and os.environ.get(REQUIRED):
        pytest.fail(f"{' and '.join(missing)} not found; make test-browser installs them on Debian and Ubuntu")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_a_report_is_read_and_answers_the_pointer_and_the_keys(
    browser: Any, report: Path, width: int, height: int, scheme: str
) -> None:
    _open(browser, report, width, height, scheme)
    body = browser.find_element("tag name", "body")
    assert "sleep adds 25.0 points" in body.text
    background = body.value_of_css_property("background-color")
    assert background == {"light": "rgba(255, 255, 255, 1)", "dark": "rgba(23, 23, 28, 1)"}[scheme]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "no horizontal scroll"
    assert browser.find_element("class name", "lead").rect["y"] < height / 2, "the words are on the first screen"
    assert browser.execute_script(_low_contrast()) == []

    _points_at(browser, browser.find_element("css selector", ".panel"))
    _arrow_keys(browser, browser.find_element("css selector", ".panel"))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == [], "no message of the console"
    requests = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert len(requests) == 1 and report.as_uri() in requests[0], "the page and nothing else"


def _open(browser: Any, report: Path, width: int, height: int, scheme: str) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser"), browser.get_log("performance")  # of the page before
    browser.get(report.as_uri())


def _low_contrast() -> str:
    """A script: the texts and the curves whose contrast with the page is low. A curve needs 3 (WCAG 2.2, 1.4.11)."""
    return f"""{LUMINANCE}
const texts = [...document.querySelectorAll("p, li, h1, h2, h3, h4, td, th, a, .panel text")]
  .map(e => [e.tagName, getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"], {CONTRAST}]);
const curves = [...document.querySelectorAll(".keys path")].map(e => ["curve", getComputedStyle(e).stroke, 3]);
return [...texts, ...curves].filter(([, color, least]) => ratio(luminance(color), paper) < least);
"""


def _points_at(browser: Any, panel: Any) -> None:
    """The pointer on the place of the last point of `N=2, mean of 2 seeds`, computed from its data."""
    from selenium.webdriver import ActionChains

    x, y = browser.execute_script(
        """
        const svg = arguments[0].querySelector("svg");
        const data = JSON.parse(arguments[0].querySelector("script").textContent);
        const [, xs, ys, , place] = data.curves.find(curve => curve[0].startsWith("N=2, mean"));
        const [left, top, right, bottom, x0, x1, y0, y1] = place;
        svg.scrollIntoView({block: "center"});
        const view = svg.viewBox.baseVal, box = svg.getBoundingClientRect(), scale = box.width / view.width;
        return [(left + (xs.at(-1) - x0) / (x1 - x0) * (right - left) - view.x) * scale - box.width / 2,
          (bottom - (ys.at(-1) - y0) / (y1 - y0) * (bottom - top) - view.y) * scale - box.height / 2];
        """,
        panel,
    )
    svg = panel.find_element("css selector", "svg")
    ActionChains(browser).move_to_element_with_offset(svg, round(x), round(y)).perform()
    assert panel.find_element("class name", "tip").text == "N=2, mean of 2 seeds\nsteps 10: 85.0 %"


def _arrow_keys(browser: Any, panel: Any) -> None:
    """From the point that the pointer has chosen: one point back, another curve, and away."""
    from selenium.webdriver import Keys

    tip = panel.find_element("class name", "tip")
    browser.execute_script("arguments[0].focus()", panel)
    panel.send_keys(Keys.ARROW_LEFT)
    assert tip.text == "N=2, mean of 2 seeds\nsteps 5: 35.0 %"
    panel.send_keys(Keys.ARROW_DOWN)
    assert "steps 5" in tip.text and "N=2, mean" not in tip.text
    panel.send_keys(Keys.ESCAPE)
    assert tip.text == ""
