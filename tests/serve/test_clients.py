"""Real clients of the server: openai, llm, litellm, curl and a raw stream."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

Server = Any  # that of conftest.py, which no test can import


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
    whole = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 9, 14)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 9
    assert all(len(each.top_logprobs) == 3 for each in choice.logprobs.content)
    data = b"".join(bytes(each.bytes or []) for each in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == choice.message.content
    stream = client.chat.completions.create(
        **asked, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert (
        "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
        == choice.message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len({each.id for each in chunks}) == 1


def test_openai_completion(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "hello", "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset == list(itertools.accumulate(map(len, logprobs.tokens[:-1]), initial=0))
    assert "".join(each.choices[0].text for each in client.completions.create(**asked, stream=True)) == (
        whole.choices[0].text
    )
    ids = client.completions.create(**asked | {"prompt": [1, 2, 3]}, max_tokens=1)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_openai_schema_and_stop(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    assert answer.choices[0].finish_reason == "stop"


def test_openai_errors_have_their_class(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="it is tiny"):
        client.chat.completions.create(model="gpt-5", messages=messages)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="tiny", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(
        openai.BadRequestError, match="the prompt takes 9000 tokens and the context holds 8192"
    ):
        client.completions.create(model="tiny", prompt=[5] * 9000, stream=True)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_llm_command(server: Server, tmp_path: Path) -> None:
    """PyPI's llm, with the OpenAI plug-in that comes with it."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: tiny\n  api_base: {server.url}/v1\n"
    )
    options = ("-o", "max_tokens", "4", "-o", "temperature", "0")
    command = [sys.executable, "-m", "llm", "-m", "here", *options, "hi"]
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = server.chat("hi", max_tokens=4).json()["choices"][0]["message"]["content"]
    assert done.stdout.decode().rstrip("\n") == expected.rstrip("\n")


def test_a_raw_stream_is_server_sent_events(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "raw" * 50}],
        "stream": True,
        "max_tokens": 5,
        "temperature": 0,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert event.startswith((": ", "data: {"))
        if event.startswith("data: "):
            json.loads(event.removeprefix("data: "))


def test_curl_reads_a_stream(server: Server) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("there is no curl")
    body = {
        "messages": [{"role": "user", "content": "curl"}],
        "stream": True,
        "max_tokens": 5,
        "temperature": 0,
    }
    arguments = ["-sN", "--noproxy", "*", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    command = [curl, *arguments, f"{server.url}/v1/chat/completions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
    assert said == server.chat("curl", max_tokens=5).json()["choices"][0]["message"]["content"]


def test_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm")
    asked: Any = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0,
                  "messages": [{"role": "user", "content": "lite"}], "max_tokens": 6}  # fmt: skip
    whole = litellm.completion(**asked).choices[0].message.content
    chunks = list(litellm.completion(**asked, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == whole
