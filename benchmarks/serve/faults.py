"""What goes wrong around a server, for longer than a test may take; the server has to answer after each fault.

    python benchmarks/serve/faults.py MODEL --malformed 10000 -- -c 512 -t 1

Faults: requests that are malformed, the engine killed under load, clients that send drop by drop, a disk that fills up
(a file system of --disk-mb megabytes under --sessions, which takes root rights; left out without them). Prints one JSON
object and exits with 1 if one of them was not survived.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from load import Served, ask, words

ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    -(2**70),
    1e308,
    "",
    "x" * 3000,
    "\0",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    [None],
    {"a": {}},
]
FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "seed",
    "stream",
    "messages",
    "prompt",
    "logprobs",
    "response_format",
    "n",
    "model",
    "packs",
    "user",
    "x",
    "repeat_penalty",
    "stream_options",
)


def malformed(served: Served, count: int) -> dict[str, int]:
    """Statuses of requests that are wrong in some way, one in three of them already as HTTP."""
    rng, statuses = random.Random(0), Counter[str]()
    with served.client() as client:
        for i in range(count):
            if i % 3 == 0:
                statuses[raw(served, rng)] += 1
                continue
            needed: Any = rng.choice([{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
            path = "/v1/completions" if "prompt" in needed else "/v1/chat/completions"
            body = {"max_tokens": 1, **needed, rng.choice(FIELDS): rng.choice(ODD)}
            data = bytearray(json.dumps(body).encode("utf-8", "surrogatepass"))
            for _ in range(rng.randrange(3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            response = client.post(path, content=bytes(data), headers={"Content-Type": "application/json"})
            statuses[str(response.status_code)] += 1
    return dict(sorted(statuses.items()))


def raw(served: Served, rng: random.Random) -> str:
    """The status of bytes that are hardly HTTP, or "closed"."""
    lines = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: 20",
    ]
    data = bytearray(b"\r\n".join(lines) + b'\r\n\r\n{"prompt": "a", "n":')
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    with connection(served) as link:
        link.sendall(data[: rng.randrange(len(data)) + 1])
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            answer = link.recv(100)
            if answer.startswith(b"HTTP/1.1 "):
                return answer[9:12].decode()
    return "closed"


def connection(served: Served) -> socket.socket:
    address = urlsplit(served.about["address"])
    assert address.hostname
    return socket.create_connection((address.hostname, address.port or 80), timeout=20)


def killed(served: Served, times: int = 3) -> dict[str, int]:
    """Statuses of requests beside which the engine is killed several times."""
    statuses, over = Counter[str](), threading.Event()

    def keep_asking(seed: int) -> None:
        with served.client() as client:
            while not over.is_set():
                body = {"prompt": words(seed, 20), "max_tokens": 20}
                statuses[str(client.post("/v1/completions", json=body).status_code)] += 1
                seed += 100

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(keep_asking, seed) for seed in range(8)]
        for _ in range(times):
            time.sleep(2)
            served.processes["server"].children()[0].kill()
            wait_for_health(served)
        over.set()
        for each in running:
            each.result()
    return dict(sorted(statuses.items()))


def wait_for_health(served: Served) -> None:
    with served.client() as client:
        end = time.monotonic() + 120
        while client.get("/health").status_code != 200 or not served.processes["server"].children():
            if time.monotonic() > end:
                sys.exit("the engine was not started again")
            time.sleep(0.2)


def slow(served: Served, count: int = 100) -> dict[str, Any]:
    """Connections that send a byte a second: how many are closed within 20 seconds, and an answer meanwhile."""
    links = [connection(served) for _ in range(count)]
    end, closed = time.monotonic() + 20, 0
    while time.monotonic() < end and links:
        for link in list(links):
            try:
                link.sendall(b"G")
                link.settimeout(0.01)
                if link.recv(10) == b"":
                    raise ConnectionResetError
            except TimeoutError:
                continue
            except OSError:
                links.remove(link)
                link.close()
                closed += 1
        time.sleep(1)
    for link in links:
        link.close()
    return {"connections": count, "closed": closed}


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path | None]:
    """A file system of a few megabytes; None without the rights for one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        mounted = (
            os.getuid() == 0 and not subprocess.run(command, capture_output=True, check=False).returncode
        )
        try:
            yield Path(folder) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=False)


def full_disk(model: str, options: list[str], megabytes: int) -> dict[str, Any]:
    """Prompts of which more is to be kept than the disk holds."""
    with small_disk(megabytes) as folder:
        if folder is None:
            return {"left out": "needs root rights"}
        served = Served(model, [*options, "--sessions", str(folder), "--sessions-bytes", str(10**9)])
        try:
            with served.client() as client:
                for i in range(400):
                    ask(client, words(i, 150), 1)
                    figures = client.get("/status").json()["figures"]
                    if figures["disk_errors_total"]:
                        break
                ask(client, words(0, 150), 1)
            names = ("disk_errors_total", "disk_bytes", "engine_deaths_total")
            return {"prompts": i + 1, **{name: figures[name] for name in names}}
        finally:
            served.end()


def still_answers(served: Served) -> bool:
    with served.client() as client:
        return bool(ask(client, "still here", 2)["choices"])


def main() -> None:
    """Run all faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--disk-mb", type=int, default=2)
    arguments, rest = parser.parse_known_args()
    options = [option for option in rest if option != "--"]
    served = Served(arguments.model, options)
    report: dict[str, Any] = {}
    try:
        report["malformed"] = malformed(served, arguments.malformed)
        with served.client() as client:
            report["deaths by these"] = client.get("/status").json()["figures"]["engine_deaths_total"]
        report["slow"] = slow(served)
        report["answers"] = still_answers(served)
        report["killed"] = killed(served)
        report["answers then"] = still_answers(served)
    except httpx.HTTPError as error:
        report["not survived"] = repr(error)
    finally:
        served.end()
    report["full disk"] = full_disk(arguments.model, options, arguments.disk_mb)
    print(json.dumps(report, indent=1))
    bad = [status for status in report.get("malformed", {}) if status.startswith("5")]
    wrong = bad or report.get("deaths by these") or not report.get("answers then")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
