"""The landing page in a real Chromium: it fits the window and the console stays empty, small and large, light and dark.

Screenshots are kept where PAGE_SCREENSHOTS names a directory.
"""

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from topologies import NOW, families

from exporter.page import Status, render
from exporter.topology import Rates
from exporter.web import Server

pytestmark = pytest.mark.real("chromium")

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """Speaks the DevTools protocol over the browser's descriptors 3 (commands) and 4 (answers, events)."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def place() -> None:
            # dup2 in an order that overwrites neither source; both ends must survive exec.
            high = os.dup(from_browser)
            os.dup2(os.dup(to_browser), 3)
            os.dup2(high, 4)

        self.process = subprocess.Popen(
            [executable, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,  # noqa: PLW1509 - nothing runs in threads yet when the browser starts
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and give its result; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(30.0)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Wait until an event of this name has come."""
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._receive(30.0))

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {seconds} s"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture(scope="module")
def browser(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = need("chromium")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.call(f"{domain}.enable")
    yield browser
    browser.close()


class Application:
    """Serves one prepared page; says `ready` and `healthy` always."""

    def __init__(self, html: str) -> None:
        self._html = html

    def metrics(self, accept: str, accept_encoding: str) -> tuple[dict[str, str], bytes]:  # noqa: ARG002 - the contract
        return {"Content-Type": "text/plain"}, b""

    def healthy(self) -> tuple[bool, str]:
        return True, "links: netlink"

    ready = healthy

    def page(self) -> str:
        return self._html


@contextmanager
def served(count: int, *, hostile: bool = False) -> Iterator[str]:
    """Serve the page of a node with so many containers, ten seconds after a first reading; give its address."""
    moments = iter((0.0, 10.0))
    rates = Rates(lambda: next(moments))
    rates.update(families(count, hostile=hostile))
    status = Status("worker-7.eu-central.example.internal", "0.1.0", "0f3c2ab91d7e", NOW - 93784, NOW)
    html = render(families(count, seconds=10.0, hostile=hostile), status, rates)
    server = Server("127.0.0.1:0", Application(html), dropped=[].append)
    server.start()
    try:
        yield f"http://127.0.0.1:{server.address[1]}/"
    finally:
        server.stop()


# What sticks out of the window, and text that is cut off though nothing says that it goes on.
_MEASURE = """(() => {
  const wide = document.scrollingElement.scrollWidth;
  const out = [...document.querySelectorAll('body *')].filter(e => {
    const r = e.getBoundingClientRect();
    return r.width > 0 && (r.right > innerWidth + 0.5 || r.left < -0.5);
  }).map(e => e.outerHTML.slice(0, 120));
  const spill = [...document.querySelectorAll('h1,h2,p,td,th,dd,dt,li,a,.badge')].filter(e =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).textOverflow !== 'ellipsis'
  ).map(e => e.outerHTML.slice(0, 120));
  const boxes = [...document.querySelectorAll('svg g')].filter(g => g.getBoundingClientRect().width > 0).flatMap(g => {
    const rects = [...g.querySelectorAll('rect')].map(r => r.getBoundingClientRect());
    return [...g.querySelectorAll('text')].filter(t => {
      const b = t.getBoundingClientRect();
      return !rects.some(r => b.left >= r.left - 0.5 && b.right <= r.right + 0.5);
    }).map(t => t.textContent);
  });
  return {wide, inner: innerWidth, out, spill, boxes, svg: document.querySelectorAll('svg').length};
})()"""


def look(browser: Browser, address: str, width: int, *, dark: bool = False) -> dict[str, Any]:
    """Open a page in a window of this width and measure it."""
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.call("Emulation.setEmulatedMedia", features=[scheme])
    browser.call("Page.navigate", url=address)
    browser.wait_for("Page.loadEventFired")
    return browser.call("Runtime.evaluate", expression=_MEASURE, returnByValue=True)["result"]["value"]


def complaints(browser: Browser) -> list[dict[str, Any]]:
    """Give what the console, the network and the security policy had to complain about."""
    browser.call("Runtime.evaluate", expression="1")
    names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    return [event for event in browser.events if event.get("method") in names]


def keep(browser: Browser, name: str) -> None:
    """Keep a picture of the whole page where the user asked for it."""
    directory = os.environ.get("PAGE_SCREENSHOTS")
    if directory:
        picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(directory, f"{name}.png").write_bytes(base64.b64decode(picture))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("count", [0, 3, 25, 300])
def test_page_fits_the_window(browser: Browser, count: int, width: int, *, dark: bool) -> None:
    """Nothing is wider than the window, no text leaves its box, and the console is empty."""
    with served(count) as address:
        measured = look(browser, address, width, dark=dark)
        keep(browser, f"{count}-{width}-{'dark' if dark else 'light'}")
        assert measured["inner"] == width
        assert measured["wide"] <= width
        assert measured["out"] == []
        assert measured["spill"] == []
        assert measured["boxes"] == []
        assert measured["svg"] == (2 if count else 0)
        assert complaints(browser) == []


def test_hostile_names_stay_text(browser: Browser) -> None:
    """Markup, scripts and control characters in names are shown, not obeyed, and break no layout."""
    with served(25, hostile=True) as address:
        measured = look(browser, address, 390)
        keep(browser, "hostile-390")
        assert measured["wide"] <= 390
        assert measured["out"] == []
        assert complaints(browser) == []
        found = browser.call(
            "Runtime.evaluate",
            expression="[document.querySelectorAll('script,img,iframe').length, String(window.hacked)]",
            returnByValue=True,
        )
        assert found["result"]["value"] == [0, "undefined"]
