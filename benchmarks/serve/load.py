"""A server under load: requests at once against one after another, warm beginnings, and memory over time.

    python benchmarks/serve_load.py MODEL --minutes 1 -- --cache-type q4_0 -t 2

Starts `edgekv serve MODEL` on a free port with what follows "--" and prints one JSON object. Wants httpx and psutil.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

WORDS = (
    "river",
    "stone",
    "light",
    "over",
    "morning",
    "the",
    "and",
    "of",
    "small",
    "boats",
    "green",
    "far",
    "quiet",
    "hills",
)


def ask(client: httpx.Client, prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A whole answer, greedy."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def ttft(client: httpx.Client, prompt: str) -> float:
    """Seconds to the first token."""
    started = time.perf_counter()
    ask(client, prompt, 1)
    return time.perf_counter() - started


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def throughput(client: httpx.Client, n: int, seed: int, at_once: int) -> float:
    """Tokens per second of n answers of 64 tokens to prompts of 32 words."""
    prompts = [text(seed + i, 32) for i in range(n)]
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(lambda prompt: ask(client, prompt, 64)["usage"]["completion_tokens"], prompts))
    return sum(done) / (time.perf_counter() - started)


def resident(server: psutil.Process) -> list[int]:
    """Resident bytes of the server and its engine."""
    return [process.memory_info().rss for process in (server, *server.children())]


def mixed(client: httpx.Client, seed: int, until: float) -> int:
    """Answers, some of them left in the middle; how many."""
    rng, n = random.Random(seed), 0
    while time.monotonic() < until:
        prompt = text(rng.randrange(6), rng.randrange(10, 120)) + text(
            rng.randrange(10**6), rng.randrange(1, 20)
        )
        body = {"prompt": prompt, "max_tokens": rng.randrange(1, 40), "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            for line, _ in enumerate(response.iter_lines()):
                if rng.random() < 0.02 and line:
                    break
        n += 1
    return n


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=2000, help="words of the long prompt")
    arguments, rest = parser.parse_known_args()
    options = [option for option in rest if option != "--"]
    command = [sys.executable, "-m", "edgekv", "serve", arguments.model, "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    about = json.loads(process.stdout.readline())
    n = about["n_parallel"]
    server = psutil.Process(process.pid)
    with httpx.Client(base_url=about["address"], timeout=600) as client:
        speeds: dict[str, list[float]] = {"one_after_another": [], "at_once": []}
        for repeat in range(arguments.repeats):
            for name, at_once in (("one_after_another", 1), ("at_once", n)):
                speeds[name].append(throughput(client, 2 * n, 1000 * repeat + 100 * at_once, at_once))
        head = text(7, arguments.depth)
        cold = ttft(client, head + " first")
        warm = [ttft(client, head + f" then {i}") for i in range(5)]
        depth = ask(client, head + " last", 1)["usage"]
        mixed(client, 0, time.monotonic() + 5)
        before = resident(server)
        until = time.monotonic() + 60 * arguments.minutes
        with ThreadPoolExecutor(2 * n) as pool:
            answered = sum(pool.map(lambda seed: mixed(client, seed, until), range(2 * n)))
        time.sleep(1)
        after = resident(server)
    print(
        json.dumps(
            {
                "command": command[2:],
                "tokens_per_second": speeds,
                "gain": statistics.median(speeds["at_once"]) / statistics.median(speeds["one_after_another"]),
                "ttft_cold_s": cold,
                "ttft_warm_s": warm,
                "depth": depth,
                "mixed_requests": answered,
                "resident_before": before,
                "resident_after": after,
            },
            indent=1,
        )
    )
    process.terminate()
    process.wait()


if __name__ == "__main__":
    main()
