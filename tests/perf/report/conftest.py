"""The sample reports as written, and a browser that opens them."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from bdlora_perf.report.render import write_report
from bdlora_perf.report.schema import Report
from tests.perf.report.samples import KINDS, make_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def reports() -> Mapping[str, Report]:
    return {kind: make_report(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def folders(reports: Mapping[str, Report], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every kind of report, written once."""
    root = tmp_path_factory.mktemp("reports")
    for kind, report in reports.items():
        write_report(report, root / kind, html=True)
    return {kind: root / kind for kind in reports}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium that logs its console and every request."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        if "CI" in os.environ:
            pytest.fail("there is no chromium and chromedriver on this machine, and CI must have them")
        pytest.skip("there is no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()
