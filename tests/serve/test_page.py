"""The page in a real browser: a chat, its figures, light and dark, on a phone, and that nothing foreign runs in it.

Needs Chromium (Debian: `apt-get install chromium`), driven through its own debugging protocol over a pipe. Without it
the tests are skipped with that advice, or fail if EDGEKV_REQUIRE_CHROMIUM is set.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgekv.export.gguf.write import write_gguf
from edgekv.progress import ignore

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def find_chromium() -> str:
    """The browser; without it the tests are skipped with advice, or fail if EDGEKV_REQUIRE_CHROMIUM is set."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        advice = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("EDGEKV_REQUIRE_CHROMIUM"):
            pytest.fail(advice)
        pytest.skip(advice)
    return found


class Browser:
    """One tab. Messages are JSON that ends with a zero byte, on descriptors 3 and 4 of the browser."""

    def __init__(self, program: str, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def arrange() -> None:
            low, high = os.dup(read_there), os.dup(write_there)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=arrange,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._to, self._from = os.fdopen(write_here, "wb"), os.fdopen(read_here, "rb")
        self._ids, self._session = itertools.count(1), ""
        self.problems: list[str] = []
        tabs = self._call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1000, height: int = 800, dark: bool = False) -> None:
        """Go to a page, in a window of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} stayed {value!r}; {self.problems}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press Enter."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self._call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self._call("Input.dispatchKeyEvent", type="keyUp", **key)

    def pixels(self) -> NDArray[np.uint8]:
        """What is seen, (height, width, 3)."""
        data = self._call("Page.captureScreenshot")["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            return np.asarray(image.convert("RGB"))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()

    def _call(self, method: str, **arguments: Any) -> Any:
        id = next(self._ids)
        message = {"id": id, "method": method, "params": arguments}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == id:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.problems.append(answer["params"]["entry"]["text"])

    def _receive(self) -> Any:
        data = bytearray()
        while not data.endswith(b"\0"):
            byte = self._from.read(1)
            assert byte, "the browser died"
            data += byte
        return json.loads(data[:-1])


@pytest.fixture(scope="module")
def server(
    make_llama: Any, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("page") / "a-model-with-quite-a-long-name-for-a-phone.gguf"
    write_gguf(make_llama(), path, "f32", {}, False, ignore)
    with serving(path, "--parallel", "2", "-c", "4096") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def share_of(pixels: NDArray[np.uint8], colour: str) -> float:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels.astype(int) - rgb).max(axis=2) < 12).mean())


def ask(browser: Browser, question: str) -> None:
    browser.run("document.getElementById('question').focus()")
    browser.type(question)
    browser.press_enter()


def idle(browser: Browser) -> None:
    browser.wait_for("!document.getElementById('send').disabled && document.getElementById('stop').hidden")


def text(browser: Browser, id: str) -> str:
    found: str = browser.run(f"document.getElementById('{id}').textContent")
    return found


def test_a_chat_and_its_figures(browser: Browser, server: Any) -> None:
    browser.open(server.url)
    browser.wait_for("document.getElementById('cells').textContent.includes('kept of 8192')")
    assert text(browser, "model") == "a-model-with-quite-a-long-name-for-a-phone"
    ask(browser, "<img src=x onerror=document.title='owned'> hello there, you")
    browser.wait_for("document.querySelectorAll('main .assistant:not(.faint)').length === 1")
    if not browser.run(
        "document.getElementById('stop').hidden"
    ):  # a random model may talk to the context's end
        browser.run("document.getElementById('stop').click()")
    idle(browser)
    first = browser.run("document.querySelector('main .assistant').textContent")
    assert first
    assert browser.run("document.querySelector('main .user').textContent").startswith("<img src=x")
    assert browser.run("document.querySelectorAll('main img').length") == 0
    assert "owned" not in browser.run("document.title")
    ask(browser, "and again")
    browser.wait_for("document.querySelectorAll('main .assistant:not(.faint)').length === 2")
    if not browser.run("document.getElementById('stop').hidden"):
        browser.run("document.getElementById('stop').click()")
    idle(browser)
    used = browser.wait_for("parseInt(document.getElementById('cells').textContent.match(/ (\\d+) kept/)[1])")
    assert 0 < used <= 8192
    browser.wait_for("parseFloat(document.getElementById('kept-bar').style.width) > 0")
    assert "MB" in text(browser, "memory")
    assert float(text(browser, "speed")) > 0
    assert browser.problems == []


def test_what_was_reused_is_shown(browser: Browser, server: Any) -> None:
    """An answer that ends by itself: its second asking finds the prompt in the cache."""
    browser.open(server.url)
    script = """(async () => {
      messages.push({role: "user", content: "%s"});
      abort = new AbortController();
      const fetched = window.fetch;
      window.fetch = (url, init) => fetched(url, url.startsWith("/v1") ?
        {...init, body: JSON.stringify({...JSON.parse(init.body), max_tokens: 3})} : init);
      await answer(say("assistant faint", "..."));
      window.fetch = fetched;
      return document.getElementById("reused").textContent;
    })()""" % ("reuse me " * 10)
    assert browser.run(script) == "0 of 90"
    browser.open(server.url)
    assert browser.run(script) == "89 of 90"


def test_errors_are_shown_and_the_question_is_kept(browser: Browser, server: Any) -> None:
    browser.open(server.url)
    ask(browser, "x" * 5000)
    browser.wait_for("document.querySelectorAll('main .error').length === 1")
    assert "the context holds 4096" in browser.run("document.querySelector('main .error').textContent")
    assert browser.run("document.getElementById('question').value.length") == 5000
    browser.problems.clear()  # the browser's own note of the 400


@pytest.mark.parametrize(
    ("dark", "ground", "ink"), [(False, "#ffffff", "#0072b2"), (True, "#14181d", "#56b4e9")]
)
def test_light_and_dark_follow_the_system(
    browser: Browser, server: Any, dark: bool, ground: str, ink: str
) -> None:
    browser.open(server.url, dark=dark)
    pixels = browser.pixels()
    assert share_of(pixels, ground) > 0.5
    assert share_of(pixels, ink) > 1e-3


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, server: Any) -> None:
    browser.open(server.url, width=360, height=640)
    browser.run("say('assistant', 'word'.repeat(200)); say('user', 'x y '.repeat(100))")
    assert browser.run("document.documentElement.scrollWidth") <= 360
    sizes = browser.run(
        "[...document.querySelectorAll('small, span, b, button')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 13
    buttons = browser.run("[...document.querySelectorAll('button:not([hidden])')].map(e => e.offsetHeight)")
    assert min(buttons) >= 40
    box = browser.run("JSON.stringify(document.getElementById('send').getBoundingClientRect())")
    assert '"bottom":6' in box or '"bottom":5' in box  # the form stays in sight


def test_nothing_foreign_is_loaded(browser: Browser, server: Any) -> None:
    headers = server.client.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    browser.open(server.url)
    loaded = browser.run("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith(server.url) for name in loaded)
    browser.run(
        "var s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s)"
    )
    assert browser.run("window.owned") is None
    browser.problems.clear()  # the policy's note of that script


def test_a_key_is_asked_for(browser: Browser, tiny_llama: Path, serving: Callable[..., Any]) -> None:
    with serving(tiny_llama, "--api-key", "sesame", "-c", "256") as server:
        browser.open(server.url)
        browser.wait_for("!document.getElementById('key-field').hidden")
        browser.run("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait_for("document.getElementById('cells').textContent.includes('of 1024')")
    browser.problems.clear()
