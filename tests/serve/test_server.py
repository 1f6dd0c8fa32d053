"""The server on loopback, asked by real clients: answers, streams, limits, and what goes wrong on the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

EDGEKV = str(Path(sys.executable).parent / "edgekv")
Server = Any  # that of conftest.py, which no test can import
Serving = Callable[..., Any]
NEAR = 0.05  # two tokens whose ln p differ by less may change places by rounding
LONG = 6000  # tokens: seconds of work


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def tokens(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return found


# Answers


def test_parallel_answers_are_those_of_lone_runs(server: Server) -> None:
    head = "the same beginning of all of them, "
    prompts = [head + "one", "two", head + "three", head * 9 + "four", "five" * 30, head + "six"]

    def ask(prompt: str) -> dict[str, Any]:
        while (
            response := server.chat(prompt, max_tokens=24, logprobs=True, top_logprobs=2)
        ).status_code == 429:
            time.sleep(0.02)
        found: dict[str, Any] = response.json()
        return found

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, prompts * 2))
    for expected, answer in zip(alone * 2, together, strict=True):
        for one, two in zip(tokens(expected), tokens(answer), strict=True):
            if one["bytes"] != two["bytes"]:
                first, second = one["top_logprobs"]
                assert first["logprob"] - second["logprob"] < NEAR
                break
    reused = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in together)
    assert reused > 12 * 32


# Refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type"),
        ({"temprature": 1}, "temprature"),
        ({"n": 2}, "n is 2"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_said(server: Server, fields: dict[str, Any], words: str) -> None:
    response = server.chat("x", **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_refusals_before_the_body_is_read(server: Server) -> None:
    post, url = server.client.post, "/v1/chat/completions"
    assert post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    big = post(url, content=b" " * 200_001, headers={"Content-Type": "application/json"})
    assert big.status_code == 413
    assert server.client.get(url).status_code == 405
    assert server.client.get("/v2").json()["error"]["code"] == "path"
    assert server.client.get("/status", headers={"Host": "evil.example"}).status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert server.client.get("/health", headers={"Host": host}).status_code == 200


def test_malformed_requests_never_break_the_server(server: Server) -> None:
    """400 bodies that are wrong in some way, most of them by one field: an answer or a refusal, never a 5xx."""
    rng = random.Random(0)
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    odd = [None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 1e308, -0.0, "", "x" * 3000, "\0", "\ud800", "é", [], [1],
           [[]], {}, {"type": "object"}, deep, [None], ["a", 1], {"a": deep}]  # fmt: skip
    valid: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "stop": ["zz"], "seed": 1, "stream": False}
    kinds = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/completions": {"prompt": "a"},
    }
    names = [*valid, "messages", "prompt", "logprobs", "top_logprobs", "response_format", "stream_options", "top_k",
             "n", "min_p", "repeat_penalty", "repeat_last_n", "model", "tools", "logit_bias", "user", "x", "echo",
             "max_completion_tokens", "metadata", "top_p"]  # fmt: skip
    statuses = set()
    for i in range(400):
        url, needed = rng.choice(list(kinds.items()))
        body: Any = {**valid, **needed, rng.choice(names): rng.choice(odd)}
        if i % 7 == 0:
            body["messages"] = [{"role": rng.choice(["user", "x", 1]), "content": rng.choice(odd)}]
        if i % 11 == 0:
            schema = {
                rng.choice(["type", "enum", "items", "$ref", "minimum", "pattern", "anyOf"]): rng.choice(odd)
            }
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        if i % 50 == 0:
            body = rng.choice(odd)
        data = json.dumps(body).encode("utf-8", "surrogatepass")
        if i % 5 == 0:
            data = data[: rng.randrange(len(data))]
        if i % 13 == 0:
            at = rng.randrange(len(data) or 1)
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        response = server.client.post(url, content=data, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400, 404), (response.status_code, response.text, data)
        statuses.add(response.status_code)
    assert statuses == {200, 400, 404}
    assert server.figures()["engine_deaths_total"] == 0
    assert server.chat("still here").status_code == 200


# Load, leaving, dying


def long(text: str, **fields: Any) -> dict[str, Any]:
    """A body whose answer takes seconds: a random model might end any other one at once."""
    schema = {"type": "string", "minLength": LONG}
    format = {"type": "json_schema", "json_schema": {"schema": schema}}
    return {"prompt": text, "max_tokens": LONG, "temperature": 0, "response_format": format, **fields}


def long_stream(server: Server, text: str) -> Any:
    return server.client.stream("POST", "/v1/completions", json=long(text, stream=True))


def test_a_client_that_leaves_stops_its_work(server: Server) -> None:
    with long_stream(server, "stay") as response:
        lines = response.iter_lines()  # kept: httpx hangs up when the iterator goes
        next(lines)
        assert server.figures()["running"] == 1
    wait_until(lambda: server.figures()["running"] == 0)
    before = server.figures()["generated_tokens_total"]
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=long("stay"), timeout=0.5)
    wait_until(lambda: server.figures()["running"] == 0)
    assert server.figures()["generated_tokens_total"] == before
    assert server.chat("next").status_code == 200


def test_a_full_queue_is_told_at_once(server: Server) -> None:
    with long_stream(server, "one") as one, long_stream(server, "two") as two:
        streams = [response.iter_lines() for response in (one, two)]
        for lines in streams:
            next(lines)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.chat, "three")
            wait_until(lambda: server.figures()["waiting"] == 1)
            refused = server.chat("four")
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert not waiting.done()
            one.close()
            assert waiting.result().status_code == 200


def test_an_engine_that_is_killed_is_started_again(server: Server) -> None:
    """Those that run get an error that says so; the one that waits in the queue is answered by the next engine."""
    with ThreadPoolExecutor(2) as pool, long_stream(server, "die") as response:
        lines = response.iter_lines()
        next(lines)
        whole = pool.submit(server.client.post, "/v1/completions", json=long("die too"))
        wait_until(lambda: server.figures()["running"] == 2)
        waiting = pool.submit(server.chat, "I wait")
        wait_until(lambda: server.figures()["waiting"] == 1)
        server.engine().kill()
        last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_died"
        assert "killed by SIGKILL" in error["message"]
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_died"
        assert waiting.result().status_code == 200
    assert server.figures()["engine_deaths_total"] == 1
    assert server.client.get("/health").json() == {"status": "ok"}


def test_health_and_metrics(server: Server) -> None:
    server.chat("measure" * 10)
    text = server.client.get("/metrics").text
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert float(values["edgekv_generated_tokens_total"]) > 0
    assert float(values["edgekv_cache_bytes"]) == server.about["cache_nbytes"]
    assert float(values["edgekv_engine_resident_bytes"]) > 1e6
    for name in values:
        assert f"# TYPE {name} counter" in text or f"# TYPE {name} gauge" in text


# Starting and ending


def test_a_key_guards_all_but_the_page(tiny_llama: Path, serving: Serving) -> None:
    with serving(tiny_llama, "--api-key", "secret", "-c", "256") as server:
        for path, status in (
            ("/", 200),
            ("/page.js", 200),
            ("/health", 200),
            ("/status", 401),
            ("/metrics", 401),
        ):
            assert server.client.get(path).status_code == status
        assert server.chat("x").status_code == 401
        for key in ("wrong", "secret2", "sécret"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.client.get("/v1/models", headers=headers).status_code == 401
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
        engine = server.engine()
        assert server.end() == 130
        assert not psutil.pid_exists(engine.pid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "give a key with --api-key"),
        (["--parallel", "65"], "parallel is 65"),
        (["--host", "256.1.1.1", "--api-key", "k"], "cannot listen"),
        (["--backend", "reference", "--parallel", "2"], "--parallel 1"),
        (["--cache-type", "q9"], "unknown cache type"),
    ],
)
def test_what_cannot_be_served_is_said(tiny_llama: Path, arguments: list[str], words: str) -> None:
    command = [EDGEKV, "serve", str(tiny_llama), "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken(tiny_llama: Path, server: Server) -> None:
    port = server.url.rpartition(":")[2]
    command = [EDGEKV, "serve", str(tiny_llama), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in done.stderr


def test_the_engine_ends_with_a_server_that_is_killed(tiny_llama: Path, serving: Serving) -> None:
    with serving(tiny_llama, "-c", "256") as server:
        engine = server.engine()
        psutil.Process(server.pid).kill()
        wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
