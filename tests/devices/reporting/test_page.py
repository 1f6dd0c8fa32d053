"""The comparison page in a real browser: what it shows, on a phone and in the dark, and that it loads nothing.

Needs Chromium (Debian: `apt-get install chromium`). Without it the tests are skipped with that advice, or
fail if EDGEKV_REQUIRE_CHROMIUM is set, as it is in CI.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgekv.devices.reporting.compare import load_sources
from edgekv.devices.reporting.page import html_page

REPORTS = Path(__file__).parent / "reports"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        advice = "Chromium is not installed: apt-get install chromium"
        if os.environ.get("EDGEKV_REQUIRE_CHROMIUM"):
            pytest.fail(advice)
        pytest.skip(advice)
    return found


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of a measured, an emulated, a projected and a llama-bench report."""
    data = json.loads((REPORTS / "measured.json").read_text())
    paths = [REPORTS / "measured.json", REPORTS / "llama-bench.json"]
    for kind in ("emulated", "projected"):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(data | {"provenance": kind}))
        paths.append(path)
    out = tmp_path / "page.html"
    out.write_text(html_page(load_sources(paths)), encoding="utf-8")
    return out


def run(chromium: str, tmp_path: Path, *arguments: str) -> str:
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def screenshot(chromium: str, page: Path, tmp_path: Path, *arguments: str) -> NDArray[np.uint8]:
    """Pixels of the page, shape (height, width, 3)."""
    out = tmp_path / "shot.png"
    run(chromium, tmp_path, f"--screenshot={out}", *arguments, page.as_uri())
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"))


def share_of(pixels: NDArray[np.uint8], colour: str) -> float:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels.astype(int) - rgb).max(axis=2) < 12).mean())


def test_charts_are_drawn_in_their_colours(chromium: str, page: Path, tmp_path: Path) -> None:
    pixels = screenshot(chromium, page, tmp_path, "--window-size=1100,1600")
    assert share_of(pixels, "#ffffff") > 0.4
    for colour in ("#0072b2", "#d55e00", "#009e73", "#a8488a"):
        assert share_of(pixels, colour) > 1e-4, colour


def test_dark_mode_follows_the_system(chromium: str, page: Path, tmp_path: Path) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    pixels = screenshot(chromium, page, tmp_path, "--window-size=1100,1600", dark)
    assert share_of(pixels, "#14181d") > 0.3
    assert share_of(pixels, "#ffffff") < 0.01
    assert share_of(pixels, "#56b4e9") > 1e-4


def test_a_phone_shows_charts_first_and_scrolls_one_way(chromium: str, page: Path, tmp_path: Path) -> None:
    harness = tmp_path / "harness.html"
    harness.write_text(
        f"""<iframe id="f" src="{page.as_uri()}" style="width:360px;height:700px;border:0"></iframe><p id="out"></p>
        <script>f.onload = () => {{
          const d = f.contentDocument, texts = [...d.querySelectorAll("figure > svg text")];
          out.textContent = JSON.stringify({{
            width: d.documentElement.scrollWidth,
            text: Math.min(...texts.map(e => e.getBoundingClientRect().height)),
            outside: texts.filter(e => e.getBoundingClientRect().right > 360).map(e => e.textContent),
            top: d.querySelector("figure").getBoundingClientRect().top,
            charts: d.querySelectorAll("figure").length, rows: d.querySelectorAll("tbody tr").length,
          }}) }}</script>"""
    )
    dom = run(chromium, tmp_path, "--allow-file-access-from-files", "--dump-dom", harness.as_uri())
    seen = json.loads(html.unescape(re.findall(r'<p id="out">(.*?)</p>', dom)[0]))
    assert seen["width"] <= 360
    assert seen["text"] >= 11
    assert seen["outside"] == []
    assert seen["top"] < 100
    assert seen["charts"] == 3
    assert seen["rows"] > 10


def test_runs_and_machines_can_be_hidden(chromium: str, page: Path, tmp_path: Path) -> None:
    harness = tmp_path / "harness.html"
    harness.write_text(
        f"""<iframe id="f" src="{page.as_uri()}" style="width:360px;height:700px"></iframe><p id="out"></p>
        <script>f.onload = () => {{
          const d = f.contentDocument, w = f.contentWindow;
          const shown = () => [...Array(d.querySelectorAll("input[id^=run]").length).keys()].filter(
            i => [...d.querySelectorAll(".run" + i)].some(e => w.getComputedStyle(e).display != "none"));
          const seen = [shown()];
          for (const name of ["run1", "machine0", "run1", "machine0"]) {{
            d.getElementById(name).click(); seen.push(shown()) }}
          out.textContent = JSON.stringify(seen) }}</script>"""
    )
    dom = run(chromium, tmp_path, "--allow-file-access-from-files", "--dump-dom", harness.as_uri())
    every, no_run, no_machine, still_none, again = json.loads(
        html.unescape(re.findall(r'<p id="out">(.*?)</p>', dom)[0])
    )
    assert len(every) > 3
    assert no_run == [i for i in every if i != 1]
    assert 0 < len(no_machine) < len(no_run)  # the llama-bench report's machine stays
    assert still_none == no_machine
    assert again == every


def test_the_page_is_complete_in_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|https?://|\son\w+=", text)
    assert "default-src 'none'" in text


def test_markup_in_a_report_stays_text(chromium: str, tmp_path: Path) -> None:
    data: Any = json.loads((REPORTS / "measured.json").read_text())
    evil = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    data["machine"]["board"] = data["runs"][0]["label"] = data["command"] = evil
    data["notes"] = [evil]
    path = tmp_path / "evil<b>.json"
    path.write_text(json.dumps(data))
    out = tmp_path / "page.html"
    out.write_text(html_page(load_sources([path])))
    dom = run(chromium, tmp_path, "--dump-dom", out.as_uri())
    assert "<script" not in dom
    assert "<img" not in dom
    assert "<title>EdgeKV comparison</title>" in dom
    assert "&lt;script&gt;" in dom
