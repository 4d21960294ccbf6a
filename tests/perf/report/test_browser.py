"""report.html in a real browser: silent, alone, everything drawn, nothing outside the page or on top of each other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from tests.perf.report.samples import KINDS

# Per plot: size of its box, how many paths have a size, and pairs of its texts that overlap or leave the box.
PLOTS = """
return [...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect(), slack = 1, clashes = [];
  const texts = [...svg.querySelectorAll('g[id*="-text_"]')].map(g => [g.id, g.getBoundingClientRect()])
    .filter(([_, r]) => r.width > 0);
  texts.forEach(([id, r], i) => {
    if (r.left < box.left - slack || r.right > box.right + slack || r.top < box.top - slack ||
        r.bottom > box.bottom + slack) clashes.push([id, 'outside']);
    texts.slice(i + 1).forEach(([other, o]) => {
      if (r.left + slack < o.right && o.left + slack < r.right && r.top + slack < o.bottom && o.top + slack < r.bottom)
        clashes.push([id, other]);
    });
  });
  const drawn = [...svg.querySelectorAll('path')].filter(p => {
    const r = p.getBoundingClientRect(); return r.width + r.height > 0; }).length;
  return {width: box.width, height: box.height, drawn: drawn, texts: texts.length, clashes: clashes};
});
"""
# What sticks out of the page on the right, except inside a box that scrolls by itself.
OVERFLOW = """
const width = document.documentElement.clientWidth;
const wide = [...document.querySelectorAll('body *')].filter(e => !e.parentElement.closest('.scroll, pre, svg') &&
  e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80));
return [document.documentElement.scrollWidth <= width, wide];
"""


def _requests(browser: webdriver.Chrome) -> list[str]:
    messages: list[dict[str, Any]] = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_report_in_a_browser(
    kind: str, width: int, scheme: str, browser: webdriver.Chrome, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    for log in ("browser", "performance"):
        browser.get_log(log)  # forget the page before
    page = folders[kind] / "report.html"
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script(OVERFLOW) == [True, []]
    plots = browser.execute_script(PLOTS)
    assert len(plots) == len(list((folders[kind] / "plots").iterdir()))
    for plot in plots:
        assert plot["width"] > 300 and plot["height"] > 100
        assert plot["drawn"] > 10 and plot["texts"] > 5
        assert plot["clashes"] == []
    assert browser.save_screenshot(str(tmp_path / f"{kind}-{width}-{scheme}.png"))
    assert _requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    ink, paper = (
        browser.execute_script(f"return getComputedStyle(document.body).{p}") for p in ("color", "backgroundColor")
    )
    # Plots take the page's colour: light on dark, or dark on light.
    assert browser.execute_script("return getComputedStyle(document.querySelector('figure svg')).color") == ink
    brightness = [sum(map(int, color[4:-1].split(","))) for color in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
