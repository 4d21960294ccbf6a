"""report.html in a real browser: silent, alone, everything drawn, nothing outside the page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from tests.perf.report.samples import KINDS

# Whether each plot is decoded, and its size on the page.
PLOTS = """
return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.width, i.height]);
"""
# What sticks out of the page on the right, except inside a box that scrolls by itself.
OVERFLOW = """
const width = document.documentElement.clientWidth;
const wide = [...document.querySelectorAll('body *')].filter(e => !e.parentElement.closest('.scroll, pre') &&
  e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80));
return [document.documentElement.scrollWidth <= width, wide];
"""


def _requests(browser: webdriver.Chrome) -> list[str]:
    messages: list[dict[str, Any]] = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]  # plots, which are in the page


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_report_in_a_browser(
    kind: str, width: int, browser: webdriver.Chrome, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    for log in ("browser", "performance"):
        browser.get_log(log)  # forget the page before
    page = folders[kind] / "report.html"
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script(OVERFLOW) == [True, []]
    plots = browser.execute_script(PLOTS)
    assert len(plots) == len(list((folders[kind] / "plots").iterdir()))
    assert all(drawn and plot_width > 300 and height > 100 for drawn, plot_width, height in plots)
    assert browser.save_screenshot(str(tmp_path / f"{kind}-{width}.png"))
    assert _requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
