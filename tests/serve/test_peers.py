"""Servers that help each other: real ones of SmolLM2 on loopback, over links that are slow, break, stall or lie."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgekv.serve.engine.exchange import MARK_NBYTES
from edgekv.workflows.pack import PackRequest, pack_documents

EDGEKV = str(Path(sys.executable).parent / "edgekv")
Server = Any  # that of conftest.py, which no test can import
KEY = "between-servers"
OPTIONS = ("-c", "1024", "--parallel", "1", "--peer-key", KEY)
SLOW = 300_000  # bytes/s, at which rows take longer than a prefill
MIN_PATIENCE_S, SILENT_S, CONNECT_S = 1.0, 2.0, 1.0  # the bounds of docs/routing.md
NEAR = 0.05  # two tokens whose ln p differ by less may change places by rounding
SPARE_S = 2.0  # of a busy machine
SLOW_LINK, FREE_LINK, FIRST_FAULT = (
    0,
    1,
    2,
)  # each fault has a link of its own: a peer that failed is left alone
FAULTS = [  # what the link does, after how many bytes of the answer, and what is asked for
    ("cut", 0, "answer"),  # the peer is killed before it answers
    ("cut", 400, "answer"),  # in the middle of its answer
    ("stall", 0, "answer"),  # it answers in a minute
    ("stall", 400, "answer"),
    ("cut", 10**6, "rows"),  # in the middle of a transfer
    ("stall", 10**6, "rows"),
    ("flip", 10**6, "rows"),
]
TIDES = "Tides come and go, twice a day, and nobody asks them why or whereto they run. "


class Link:
    """A way to a server on this machine; its fault begins with the first answer to a question or to a call for rows.

    Attributes:
        open: whether connections are taken.
        fault: "slow" for SLOW bytes/s always; "cut", "stall" or "flip" at `after` bytes of an answer; "" for none.
    """

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.open, self.fault, self.after = False, "", 0
        self.asked: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.open:
                    threading.Thread(target=self._serve, args=(near,), daemon=True).start()
                else:
                    near.close()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._target) as far, contextlib.suppress(OSError):
            state = {"left": -1}
            threading.Thread(target=self._questions, args=(near, far, state), daemon=True).start()
            while (data := far.recv(2**14)) and self.open:
                if self.fault == "slow":
                    time.sleep(len(data) / SLOW)
                if state["left"] >= 0 and self.fault in ("cut", "stall", "flip"):
                    state["left"] -= len(data)
                    if state["left"] < 0:
                        if self.fault == "stall":
                            time.sleep(30)
                        if self.fault != "flip":
                            return
                        data = data[:-1] + bytes([data[-1] ^ 1])
                        state["left"] = 2**60
                near.sendall(data)

    def _questions(self, near: socket.socket, far: socket.socket, state: dict[str, int]) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(2**16):
                for path in ("/peer/answer", "/peer/rows"):
                    if path.encode() in data:
                        state["left"] = self.after
                        self.asked.append(path)
                far.sendall(data)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)


@dataclass
class Pair:
    """A server, its peer, and the links between them."""

    near: Server
    far: Server
    links: list[Link]
    cold_s: float = 0.0


def prompt(number: int) -> str:
    return f"Text {number * 7919} of many. " + TIDES * 20 + "\n\nWrite the alphabet from A to Z, with commas."


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def peers(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/status").json()["peers"]
    return found


def n_blocks(server: Server) -> int:
    """Of a server's catalogue."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return len(httpx.get(f"{server.url}/peer/catalogue", headers=headers).content) // MARK_NBYTES


@pytest.fixture(scope="module")
def pair(
    smollm2: Path, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("packs")
    (folder / "tides.txt").write_text(TIDES * 10)
    pack_documents(
        PackRequest((folder / "tides.txt",), smollm2, folder / "tides.pack", cache_type="f32", threads=1)
    )
    with serving(smollm2, *OPTIONS, "-c", "8192", "--packs", str(folder)) as far:
        links = [Link(far.url) for _ in range(FIRST_FAULT + len(FAULTS))]
        options = [word for link in links for word in ("--peer", link.url)]
        with serving(smollm2, *OPTIONS, *options) as near:
            made = Pair(near, far, links)
            began = time.monotonic()
            near.chat(prompt(0), max_tokens=1)
            made.cold_s = time.monotonic() - began
            yield made
        for link in links:
            link.close()


@contextlib.contextmanager
def opened(pair: Pair, index: int, fault: str = "", after: int = 0, text: str = "") -> Iterator[Link]:
    """One of the links, once the near server knows of what the far one has cached behind it."""
    link = pair.links[index]
    before = n_blocks(pair.far)
    if text:
        assert pair.far.chat(text, max_tokens=1).status_code == 200
        wait_until(lambda: n_blocks(pair.far) > before)
    link.open, link.fault, link.after = True, fault, after
    link.asked.clear()
    wait_until(lambda: peers(pair.near)[index]["usable"])
    wait_until(lambda: peers(pair.near)[index]["blocks"] == n_blocks(pair.far))
    yield link
    link.open = False
    wait_until(lambda: not peers(pair.near)[index]["usable"])


@contextlib.contextmanager
def busy(server: Server) -> Iterator[None]:
    """A server that has other things to do, and says so."""
    left = threading.Event()

    def work() -> None:
        schema = {"schema": {"type": "string", "minLength": 4000}}
        body = {"prompt": "Say: ", "max_tokens": 900, "stream": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            for _ in response.iter_lines():
                if left.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(4.0)  # what it says is at most two seconds old
    yield
    left.set()
    thread.join()


def streamed(server: Server, text: str, **fields: Any) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first text of an answer, the text, and the usage."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | fields
    began, first, parts, usage = time.monotonic(), 0.0, [], {}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.monotonic() - began
                    parts.append(choice["delta"]["content"])
    return first, "".join(parts), usage


def require_same(pair: Pair, text: str, said: str) -> None:
    """An answer is what the far server says by itself, up to where two tokens are as good as equally likely."""
    answer = pair.far.chat(text, max_tokens=12, logprobs=True, top_logprobs=2).json()
    at = 0
    for token in answer["choices"][0]["logprobs"]["content"]:
        if said[at : at + len(token["token"])] != token["token"][: len(said) - at]:
            first, second = token["top_logprobs"]
            assert first["logprob"] - second["logprob"] < NEAR
            return
        at += len(token["token"])


# The three choices


def test_a_question_goes_to_the_rows_over_a_slow_link(pair: Pair) -> None:
    with opened(pair, SLOW_LINK, "slow", text=prompt(1)) as link:
        before = pair.near.figures()
        _, text, usage = streamed(pair.near, prompt(1))
        after = pair.near.figures()
    assert link.asked == ["/peer/answer"]
    assert after["routed_total"] == before["routed_total"] + 1
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"]  # its own engine was not asked
    assert usage["prompt_tokens_details"]["cached_tokens"] > 200
    require_same(pair, prompt(1), text)


def test_rows_come_here_while_their_server_is_busy(pair: Pair) -> None:
    with opened(pair, FREE_LINK, text=prompt(2)) as link, busy(pair.far):
        before = pair.near.figures()
        _, text, usage = streamed(pair.near, prompt(2))
        after = pair.near.figures()
    assert link.asked == ["/peer/rows"]
    assert after["fetched_total"] == before["fetched_total"] + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] > 200
    require_same(pair, prompt(2), text)


def test_what_nobody_has_is_computed_here(pair: Pair) -> None:
    with opened(pair, FREE_LINK) as link, busy(pair.far):
        _, text, usage = streamed(pair.near, prompt(3))
    assert link.asked == []
    assert usage["prompt_tokens_details"]["cached_tokens"] < 32
    require_same(pair, prompt(3), text)


def test_a_pack_that_a_peer_has_can_be_named_here(pair: Pair) -> None:
    with opened(pair, FREE_LINK) as link:
        assert "this server has no packs" in pair.near.chat("x", packs=["moon"]).text
        response = pair.near.chat("x", packs=["tides"], max_tokens=1)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert link.asked == ["/peer/answer"]


# Faults


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[" ".join(map(str, each)) for each in FAULTS])
def test_a_fault_costs_no_answer(pair: Pair, index: int) -> None:
    fault, after, what = FAULTS[index]
    text = prompt(10 + index)
    is_busy = busy(pair.far) if what == "rows" else contextlib.nullcontext()
    with opened(pair, FIRST_FAULT + index, fault, after, text=text) as link, is_busy:
        before = pair.near.figures()
        first_s, said, usage = streamed(pair.near, text, max_tokens=12)
        after_it = pair.near.figures()
    assert link.asked == [f"/peer/{what}"]
    assert after_it["peer_failures_total"] == before["peer_failures_total"] + 1
    assert after_it["routed_total"] == before["routed_total"]
    assert usage["completion_tokens"] == 12
    assert first_s < pair.cold_s + max(MIN_PATIENCE_S, pair.cold_s) + CONNECT_S + SILENT_S + SPARE_S
    require_same(pair, text, said)


def test_a_peer_of_another_model_or_key_is_not_asked(
    pair: Pair, tiny_mla: Path, serving: Callable[..., Any]
) -> None:
    with serving(tiny_mla, *OPTIONS, "--peer", pair.far.url, "--peer", "http://127.0.0.1:9") as other:
        wait_until(lambda: "another model" in peers(other)[0]["why_not"])
        wait_until(lambda: "cannot be reached" in peers(other)[1]["why_not"])
        assert other.chat("x" * 300).status_code == 200
        assert other.figures()["peers_usable"] == 0
        options = ("-c", "1024", "--peer", other.url)
        with serving(tiny_mla, *options, "--peer-key", "wrong") as stranger:
            wait_until(lambda: "another key" in peers(stranger)[0]["why_not"])
            assert stranger.chat("x" * 300).status_code == 200
        for path in ("state", "catalogue", "noise?n=9"):
            assert httpx.get(f"{other.url}/peer/{path}").status_code == 401
        assert httpx.post(f"{other.url}/peer/rows", json={"block": "0" * 32, "count": 16}).status_code == 401


def test_rows_that_are_not_there_and_requests_that_are_none(pair: Pair) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=pair.far.url, headers=headers) as client:
        lost = client.post("/peer/rows", json={"block": "0" * 32, "count": 16})
        assert (lost.status_code, "not here any more" in lost.text) == (400, True)
        for body in ({"block": "0", "count": 16}, {"block": "../../x", "count": 16}, {"count": 16}, []):
            assert client.post("/peer/rows", json=body).status_code == 400
        assert client.get("/peer/noise?n=99999999").status_code == 400
        assert client.post("/peer/answer", json={"messages": []}).status_code == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--peer", "http://pi-2:8080"), "can be reached from other machines"),
        (("--host", "0.0.0.0", "--api-key", "k", "--peer", "http://127.0.0.1:1"), "--peer-key"),
        (("--peer", "pi-2"), "is no address of a server"),
        (("--peer", "http://127.0.0.1:1/v1"), "is no address of a server"),
        (("--peer-key", "a b"), "peers' key holds blanks"),
        (("--peer-key", "k", "--budget", "256"), "leave --budget out"),
    ],
)
def test_what_cannot_be(tiny_mla: Path, options: tuple[str, ...], words: str) -> None:
    done = subprocess.run([EDGEKV, "serve", str(tiny_mla), *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr


def test_without_a_key_other_machines_get_nothing(tiny_mla: Path, serving: Callable[..., Any]) -> None:
    with serving(tiny_mla, "--host", "0.0.0.0", "--api-key", "k", "-c", "512") as server:
        port = server.url.rpartition(":")[2]
        headers = {"Authorization": "Bearer k"}
        assert httpx.get(f"http://127.0.0.1:{port}/peer/state", headers=headers).status_code == 404
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).status_code == 200
