"""PyPI's `openai` against a server that a command starts, and the memory that the server says it takes.

    python benchmarks/arm/client.py COMMAND...        one that runs `edgekv serve MODEL --port 0 --json`

Asks a question whole and streamed, and ends the server with SIGTERM. Exits with 1 if an answer is wrong, or none came.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

MESSAGES: list[ChatCompletionUserMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]
WANTED, MAX_TOKENS = "Paris", 8
TIMEOUT_S = 600  # an emulated core decodes a few tokens per second


def ask(address: str) -> bool:
    """Whether a whole and a streamed answer, which are printed, both have the wanted word.

    They may differ: the second one finds its prompt in the cache, and rounds otherwise than a prefill does.
    """
    with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as client:
        [model] = client.models.list()
        create = client.chat.completions.create
        whole = create(model=model.id, messages=MESSAGES, max_tokens=MAX_TOKENS, temperature=0)
        chunks = create(model=model.id, messages=MESSAGES, max_tokens=MAX_TOKENS, temperature=0, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    text = whole.choices[0].message.content or ""
    print(f"{model.id}: {text!r}, streamed {streamed!r}")
    return WANTED in text and WANTED in streamed


def main() -> int:
    """Start, ask, end; the exit code."""
    server = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert server.stdout is not None
    right = False
    try:
        if line := server.stdout.readline():
            address = json.loads(line)["address"]
            right = ask(address)
            with urllib.request.urlopen(f"{address}/status", timeout=TIMEOUT_S) as response:
                print(response.read().decode())
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
