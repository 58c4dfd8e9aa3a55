"""Look at every page of build/site in a browser: errors, requests that fail or leave this machine, pages too wide.

    python docs/check_site.py --screenshots runs/site

Needs Chromium and its driver (Debian: chromium, chromium-driver). Exit code 1: something was found.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

from prismatic.command_line import UsageError, bad_input_in_one_line, flag, parse

WIDTHS = (1280, 390)
"""Of a desk and of a phone, in pixels."""
SWITCHES = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "hide-scrollbars"),
)
WAIT_S = 10.0


@dataclass
class CheckSiteConfig:
    """Flags."""

    site: str = flag("build/site", "folder of the built site")
    pages: str = flag("", "only pages whose address has this in it")
    screenshots: str = flag("", "folder for a picture of every page and width; empty: none")

    def __post_init__(self) -> None:
        if not (Path(self.site) / "index.html").is_file():
            raise UsageError(f"--site {self.site}: found no index.html, expected a built site: make docs")


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The address at which the folder is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@contextmanager
def browser() -> Iterator[Chrome]:
    """Chromium, which keeps its console and its requests."""
    options = ChromeOptions()
    for switch in SWITCHES:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, place in places.items():
        if place is None:
            raise UsageError(f"{name} was not found, expected it in PATH")
    options.binary_location = places["chromium"] or ""
    driver = Chrome(options, ChromeService(places["chromedriver"]))
    yield driver
    driver.quit()


def faults(driver: Chrome, address: str) -> list[str]:
    """What the console and the network have to say since the last call."""
    found = [f"console: {entry['message']}" for entry in driver.get_log("browser") if entry["level"] != "INFO"]
    for entry in driver.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        url = event["params"].get("request", {}).get("url", "")
        if event["method"] == "Network.requestWillBeSent" and not url.startswith((address, "data:", "blob:")):
            found.append(f"request to {url}")
        if event["method"] == "Network.loadingFailed" and not event["params"].get("canceled"):
            found.append(f"request failed: {event['params']['errorText']}")
        if event["method"] == "Network.responseReceived" and event["params"]["response"]["status"] >= 400:
            found.append(f"{event['params']['response']['status']}: {event['params']['response']['url']}")
    return found


def look(driver: Chrome, address: str, page: str, width: int, picture: Path | None) -> list[str]:
    """What is wrong with one page at one width."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(address + page)
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    found = faults(driver, address) + ([f"{wide} px wide, in a window of {width}"] if wide > width else [])
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        high = driver.execute_script("return document.documentElement.scrollHeight")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": min(high, 8000)})
        driver.save_screenshot(str(picture))
    return found


def search(driver: Chrome, address: str) -> list[str]:
    """Whether the search finds a word of the glossary."""
    driver.get(address)
    driver.execute_script("document.querySelector('[data-md-toggle=search]').click()")
    driver.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("playback")
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if driver.find_elements(By.CSS_SELECTOR, ".md-search-result__item"):
            return faults(driver, address)
        time.sleep(0.1)
    return [*faults(driver, address), "the search found nothing"]


def main() -> int:
    """Print what is wrong; returns the exit code."""
    with bad_input_in_one_line("check_site.py"):
        cfg = parse(CheckSiteConfig, description=__doc__)
    site = Path(cfg.site)
    pages = sorted(path.parent.relative_to(site).as_posix() + "/" for path in site.rglob("index.html"))
    pages = ["" if page == "./" else page for page in pages if cfg.pages in page]
    bad = 0
    with bad_input_in_one_line("check_site.py"), served(cfg.site) as address, browser() as driver:
        results = [("search", search(driver, address))]
        for page in pages:
            for width in WIDTHS:
                name = f"{page.strip('/').replace('/', '-') or 'index'}-{width}.png"
                picture = Path(cfg.screenshots) / name if cfg.screenshots else None
                results.append((f"{page or 'start'} at {width} px", look(driver, address, page, width, picture)))
    for place, found in results:
        bad += len(found)
        for line in found:
            print(f"{place}: {line}")
    print(f"{len(pages)} pages at {len(WIDTHS)} widths: {bad} found")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
