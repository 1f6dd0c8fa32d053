"""A server under load: memory over time, every answer against its lone run, requests at once, warm beginnings.

    python benchmarks/serve/load.py MODEL --minutes 30 -o benchmarks/results/serve-load.json -- --cache-type q4_0 -t 2

Starts `edgekv serve MODEL` on a free port with what follows "--". --clients clients then send prompts of a fixed set,
chosen at random, whole and streamed, and leave a third of them in the middle. Each complete greedy answer is compared
with the one that the same server gave before, with nothing beside it. Where two tokens of it are as good as equally
likely, rounding may choose the other one: a batch of several sequences takes other kernels. Such answers are counted
as near, with the gap of the two in nats; those beyond --near are wrong, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

WORDS = ("river", "stone", "light", "over", "morning", "the", "and", "of", "small", "boats", "green", "far", "quiet",
         "hills")  # fmt: skip
N_THROUGHPUT, N_NEW = 8, 64  # answers of one measurement of throughput, and their tokens
SAMPLE_S = 2.0
WARM_UP = 0.1  # the share of the time after which memory is compared


class Served:
    """A running server."""

    def __init__(self, model: str, options: list[str]) -> None:
        self.command = [sys.executable, "-m", "edgekv", "serve", model, "--port", "0", "--json", *options]
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the server did not start")
        self.about: dict[str, Any] = json.loads(line)
        server = psutil.Process(self._process.pid)
        self.processes = {"server": server, "engine": server.children()[0]}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.about["address"], timeout=600)

    def memory(self) -> dict[str, int]:
        """Resident and proportional bytes of both processes."""
        found = {}
        for name, process in self.processes.items():
            info = process.memory_full_info()
            found |= {f"{name}_rss": info.rss, f"{name}_pss": info.pss}
        return found

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def ask(client: httpx.Client, prompt: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A whole answer, greedy."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def throughput(client: httpx.Client, seed: int, at_once: int) -> float:
    """Tokens per second of answers to short prompts."""
    prompts = [words(seed + i, 8) for i in range(N_THROUGHPUT)]
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda prompt: ask(client, prompt, N_NEW), prompts)
        n_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return n_tokens / (time.perf_counter() - started)


def first_token_s(client: httpx.Client, prompt: list[int]) -> float:
    started = time.perf_counter()
    ask(client, prompt, 1)
    return time.perf_counter() - started


def fixed_prompts(count: int) -> list[tuple[str, int]]:
    """Prompts of 10 to 300 words, of which several begin alike, and how many tokens to ask for."""
    rng = random.Random(1)
    heads = [words(100 + i, n) for i, n in enumerate((40, 80, 250))]
    return [
        (f"{rng.choice(heads)} {words(1000 + i, rng.randrange(4, 60))}", rng.randrange(2, 40))
        for i in range(count)
    ]


def gap(lone: dict[str, Any], answer: dict[str, Any]) -> float | None:
    """None for the same tokens, else how much likelier the lone run's first other token was than its second."""
    one, two = (each["choices"][0]["logprobs"] for each in (lone, answer))
    for i, (token, other) in enumerate(itertools.zip_longest(one["tokens"], two["tokens"])):
        if token != other:
            longer = one if i < len(one["tokens"]) else two  # the other one ended here
            values = sorted(longer["top_logprobs"][i].values(), reverse=True)
            return float(values[0] - values[1])
    return None


class Load:
    """Clients that ask at random until the time is over."""

    def __init__(self, served: Served, prompts: list[tuple[str, int]], lone: list[dict[str, Any]]) -> None:
        self._served, self._prompts, self._lone = served, prompts, lone
        self.counts: Counter[str] = Counter()
        self.gaps: list[float] = []
        self._lock = threading.Lock()

    def run(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        with self._served.client() as client:
            while time.monotonic() < until:
                number = rng.randrange(len(self._prompts))
                try:
                    leaves = rng.random() < 1 / 3
                    kind = self._leave(client, number, rng) if leaves else self._compare(client, number)
                except httpx.HTTPError as error:
                    kind = f"failed: {type(error).__name__}"
                with self._lock:
                    self.counts[kind] += 1

    def _leave(self, client: httpx.Client, number: int, rng: random.Random) -> str:
        prompt, max_tokens = self._prompts[number]
        body = {"prompt": prompt + f" {rng.random()}", "max_tokens": max_tokens, "stream": True}
        last = rng.randrange(0, 8)
        with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line, _ in enumerate(response.iter_lines()):
                if line >= last:
                    return "left"
        return "left"

    def _compare(self, client: httpx.Client, number: int) -> str:
        prompt, max_tokens = self._prompts[number]
        found = gap(self._lone[number], ask(client, prompt, max_tokens, logprobs=2))
        if found is None:
            return "equal"
        with self._lock:
            self.gaps.append(found)
        return "other"


def mixed(served: Served, options: argparse.Namespace) -> tuple[Load, list[dict[str, Any]]]:
    """Load for some minutes; what the answers were, and memory over time."""
    prompts = fixed_prompts(options.prompts)
    with served.client() as client:
        lone = [ask(client, prompt, max_tokens, logprobs=2) for prompt, max_tokens in prompts]
    load = Load(served, prompts, lone)
    started = time.monotonic()
    until = started + 60 * options.minutes
    samples = []
    with ThreadPoolExecutor(options.clients) as pool:
        running = [pool.submit(load.run, seed, until) for seed in range(options.clients)]
        while time.monotonic() < until:
            samples.append({"second": round(time.monotonic() - started), **served.memory()})
            time.sleep(SAMPLE_S)
        for each in running:
            each.result()
    return load, samples


def drift(samples: list[dict[str, Any]], name: str) -> float:
    """Megabytes between the medians of the tenth after warming up and of the last one."""
    values = [sample[name] for sample in samples[int(WARM_UP * len(samples)) :]]
    tenth = max(1, len(values) // 10)
    return round((statistics.median(values[-tenth:]) - statistics.median(values[:tenth])) / 1e6, 2)


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest, to three digits."""
    low, median, high = (float(f"{x:.3g}") for x in (min(values), statistics.median(values), max(values)))
    return {"median": median, "low": low, "high": high}


def measure(served: Served, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the result."""
    n = served.about["n_parallel"]
    rows: list[dict[str, Any]] = []
    with served.client() as client:
        ask(client, "warm up", 8)
        speeds: dict[int, list[float]] = {1: [], n: []}
        for repeat, at_once in itertools.product(range(options.repeats), (1, n)):
            speeds[at_once].append(throughput(client, 1000 * repeat + 100 * at_once, at_once))
        rows += [{"what": f"tokens/s, {k} at once", "value": spread(v)} for k, v in speeds.items()]
        gains = [many / one for one, many in zip(speeds[1], speeds[n], strict=True)]
        rows.append({"what": f"gain of {n} at once", "value": spread(gains)})
        rng = random.Random(0)
        head = [rng.randrange(1000, 9000) for _ in range(options.depth)]
        cold = first_token_s(client, [*head, 1000])
        warm = [first_token_s(client, [*head, 1001 + i, 7]) for i in range(9)]
        rows.append(
            {"what": f"ms to the first token at depth {options.depth}, cold", "value": round(1000 * cold)}
        )
        rows.append({"what": "ms to the first token, warm", "value": spread([1000 * each for each in warm])})
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    load, samples = mixed(served, options)
    wrong = sum(each > options.near for each in load.gaps)
    for kind, count in sorted(load.counts.items()):
        rows.append({"what": f"requests: {kind}", "value": count})
    rows.append({"what": f"answers with another token at a gap above {options.near} nats", "value": wrong})
    rows.append({"what": "largest gap", "value": round(max(load.gaps, default=0.0), 3)})
    for name in samples[0]:
        if name != "second":
            values = [sample[name] / 1e6 for sample in samples]
            rows.append({"what": f"{name}, MB", "value": spread(values), "drift": drift(samples, name)})
    with served.client() as client:
        figures = client.get("/status").json()["figures"]
    rows.append({"what": "deaths of the engine", "value": figures["engine_deaths_total"]})
    return rows


def commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24, help="in the fixed set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--near", type=float, default=0.25, help="nats")
    parser.add_argument("-o", "--output", type=Path)
    options, rest = parser.parse_known_args()
    served = Served(options.model, [option for option in rest if option != "--"])
    try:
        rows = measure(served, options)
    finally:
        served.end()
    result = {
        "title": f"edgekv serve under load: {Path(options.model).name}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "versions": {"llama-cpp-python": version("llama-cpp-python"), "edgekv": version("edgekv")},
        "command": ["python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])],
        "columns": [
            {"key": "what", "title": ""},
            {"key": "value", "title": "value"},
            {"key": "drift", "title": "drift, MB"},
        ],
        "rows": [{"drift": None} | row for row in rows],
        "notes": f"{options.clients} clients for {options.minutes:g} minutes; the first five rows before that. "
        "'other': an answer of a batch chose another token than alone, where both were as good as equally likely.",
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    failed = [
        row
        for row in rows
        if row["what"].startswith(("answers with another", "requests: failed")) and row["value"]
    ]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
