"""A browser without a screen, and the page of the made-up results in it."""

import json
import os
import shutil

import pytest

from parity.report.command import main as write_report
from tests.parity.report import made_up

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


def _why_no_browser():
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs the package 'selenium'"
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"needs {' and '.join(missing)} (Debian's packages chromium and chromium-driver)" if missing else ""


class Browser:
    """Chromium at a page; remembers what the console and the network said."""

    def __init__(self, profile):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = Service(shutil.which("chromedriver"), log_output=os.devnull)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.url = ""

    def see(self, width=1200, height=900, dark=False):
        """Set the window and the colour scheme."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, path, fragment=""):
        self.url = path.as_uri()
        self.driver.get("about:blank")
        self.complaints()
        self.requests()
        self.driver.get(self.url + fragment)

    def go(self, fragment):
        """Follow a fragment, as a link on the page does."""
        self.run("location.hash = arguments[0]", fragment)
        self.settled(fragment)

    def settled(self, fragment):
        """Wait until the page shows a fragment."""
        self.until("return document.documentElement.dataset.shown === arguments[0]", fragment)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, *arguments):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 10).until(lambda _: self.run(script, *arguments))

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def complaints(self):
        """What the console got since the last call: errors, and what the page's policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def _network(self, event):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [message["params"] for message in messages if message["method"] == f"Network.{event}"]

    def requests(self):
        """Addresses asked for since the last call."""
        return [sent["request"]["url"] for sent in self._network("requestWillBeSent")]

    def refusals(self):
        """Why what was asked for since the last call was not sent."""
        return [failed.get("blockedReason") for failed in self._network("loadingFailed")]

    def close(self):
        self.driver.quit()


@pytest.fixture(scope="session")
def _browser(tmp_path_factory):
    if reason := _why_no_browser():
        pytest.skip(reason)
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(_browser):
    _browser.see()
    return _browser


class Quiet:
    """A console that says nothing."""

    def print(self, *_, **__):
        pass


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The report of the made-up results."""
    folder = made_up.folder(tmp_path_factory.mktemp("run"))
    assert write_report(folder, None, False, Quiet()) == 0
    return folder / "report.html"
