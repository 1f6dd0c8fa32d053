"""Time to the first token predicted against measured, for the three ways to answer a prompt that a peer has cached.

    python benchmarks/route/boards.py MODEL --cache-type q4_0 -o benchmarks/results/route-boards.json

Two servers of MODEL on this machine, a core each, and between them links of emulated bandwidth and delay
(benchmarks/route/link.py). The far one has read a text of each size. The near one then answers a question behind it,
forced to take each way, with nothing of it in its own cache, after it has said what each would cost; local answers do
not depend on the link. Speeds are those that the servers measured by themselves, before each answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from edgekv.cache.rows import CacheRows
from edgekv.cache.rows_file import read_rows_file, write_rows
from edgekv.serve.engine.blocks import block_hashes
from edgekv.serve.engine.disk import NoNotes
from edgekv.serve.engine_process import EngineProcess, Options
from edgekv.serve.peers.router import Router
from edgekv.serve.peers.ways import Plan, Ways, find_ways
from edgekv.serve.settings import ServerSettings

LINKS = {"gigabit": (117.0, 0.4), "Wi-Fi": (6.0, 4.0), "bad link": (0.25, 150.0)}  # MB/s, ms of a round trip
SIZES = (500, 1000, 2000, 4000, 6000)
MAX_FETCH_S = 60.0  # what is predicted to take longer is not measured
QUESTION = 24  # tokens behind a text
WARM_UP = 3000  # tokens that the near server has read before, as a server that has been used
TIMEOUT_S = 600.0
KEY = "benchmark"


@dataclass(frozen=True)
class Measured:
    """One answer."""

    link: str
    n_tokens: int
    way: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


def job(tokens: list[int]) -> dict[str, Any]:
    """A request for one token, as the server's API makes it."""
    return {
        "messages": None,
        "text": None,
        "tokens": tokens,
        "packs": [],
        "sampling": {"temperature": 0.0},
        "max_tokens": 1,
        "stop": [],
        "json_object": False,
        "schema": None,
        "top_logprobs": None,
    }


class Near:
    """The near server's engine and router, without HTTP in front of them."""

    def __init__(self, options: argparse.Namespace, n_ctx: int, folder: Path) -> None:
        self.engine = EngineProcess(
            Options(options.model, None, 1, n_ctx, options.cache_type, options.threads, shares=True),
            queue=4,
            timeout_s=TIMEOUT_S,
        )
        self.engine.open()
        self._n_ctx, self.folder = n_ctx, folder
        self._filler = folder / "filler"

    async def first_token_s(self, router: Router, tokens: list[int], plan: Plan | None) -> float:
        """Seconds to the first token of a prompt, over a peer or here."""
        wanted = job(tokens)
        began = time.monotonic()
        if plan is None:
            source: AsyncIterator[dict[str, Any]] = self.engine.answer(**wanted)
        else:
            source = router.over(plan, wanted, [], began + TIMEOUT_S)
        async with aclosing(source) as events:  # type: ignore[type-var]
            async for event in events:
                if "token" in event:
                    return time.monotonic() - began
        raise AssertionError("there was no token")

    async def forget(self) -> None:
        """Fill the cache with rows of nothing, which drive out all others."""
        tokens = [1] * (self._n_ctx // 16 * 16 - 16)
        block = block_hashes(tokens)[-1].hex()
        if not self._filler.exists():
            await self._write_filler(tokens)
        await self.engine.take(block, len(tokens), str(self._filler))
        await asyncio.sleep(0.5)

    async def _write_filler(self, tokens: list[int]) -> None:
        probe = [2] * 17
        async for _ in self.engine.answer(**job(probe)):
            pass
        path = self.folder / "probe"
        await self.engine.ask("offer", block=block_hashes(probe)[0].hex(), count=16, path=str(path))
        header = read_rows_file(path, "edgekv.prefix").header
        empty = CacheRows.empty(header.layout, len(tokens))
        rows = CacheRows(header.layout, len(tokens), np.zeros_like(empty.data))
        with self._filler.open("wb") as file:
            write_rows(file, header, tokens, rows, NoNotes())


@asynccontextmanager
async def linked(near: Near, port: int, mb_s: float, ms: float) -> AsyncIterator[Router]:
    """A router of the near server to the far one over a link, once it knows it."""
    command = [sys.executable, str(Path(__file__).with_name("link.py")), "--to", str(port)]
    process = subprocess.Popen(
        [*command, "--mb-s", str(mb_s), "--ms", str(ms)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    settings = ServerSettings(parallel=1, peers=(url,), peer_key=KEY)
    router = Router(near.engine, settings, near.folder, lambda words: print(words, file=sys.stderr))
    life = asyncio.create_task(router.live())
    try:
        while not router.peers[0].usable:
            await asyncio.sleep(0.1)
        yield router
    finally:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        process.kill()


def asked(text: list[int], seed: str) -> list[int]:
    """A question behind a text that the far server has read."""
    rng = random.Random(seed)
    return [*text, *(rng.randrange(1000, 9000) for _ in range(QUESTION))]


def prompts(sizes: list[int]) -> dict[int, list[int]]:
    rng = random.Random(0)
    return {size: [rng.randrange(1000, 9000) for _ in range(size)] for size in sizes}


async def measure_link(
    near: Near, router: Router, name: str, texts: dict[int, list[int]], repeats: int
) -> list[Measured]:
    """Each size, routed and fetched."""
    found = []
    for number, text in enumerate(text for _ in range(repeats) for text in texts.values()):
        for way in ("route", "fetch"):
            tokens = asked(text, f"{name} {way} {number}")
            await near.forget()
            ways = await find_ways(near.engine, router.peers, job(tokens))
            plan = next(plan for plan in ways.over_peers if plan.way == way)
            if plan.cost.first_token_s > MAX_FETCH_S:
                continue
            seconds = await near.first_token_s(router, tokens, plan)
            found.append(Measured(name, len(text), way, plan.cost.first_token_s, seconds))
            print(found[-1], file=sys.stderr, flush=True)
    return found


async def measure_local(
    near: Near, router: Router, texts: dict[int, list[int]], repeats: int
) -> list[Measured]:
    """Each size, computed here."""
    found = []
    for number, text in enumerate(text for _ in range(repeats) for text in texts.values()):
        tokens = asked(text, f"local {number}")
        await near.forget()
        ways: Ways = await find_ways(near.engine, router.peers, job(tokens))
        assert ways.local is not None
        seconds = await near.first_token_s(router, tokens, None)
        found.append(Measured("", len(text), "local", ways.local.first_token_s, seconds))
        print(found[-1], file=sys.stderr, flush=True)
    return found


async def measure(options: argparse.Namespace, far: dict[str, Any]) -> list[Measured]:
    """All answers."""
    texts, found = prompts(options.sizes), []
    with tempfile.TemporaryDirectory() as folder:
        near = Near(options, far["n_ctx"], Path(folder))
        life = asyncio.create_task(near.engine.live())
        port = int(far["address"].rpartition(":")[2])
        try:
            async with linked(near, port, *LINKS["gigabit"]) as router:
                await near.first_token_s(router, prompts([WARM_UP])[WARM_UP], None)
                found += await measure_local(near, router, texts, options.repeats)
            for name, link in LINKS.items():
                async with linked(near, port, *link) as router:
                    found += await measure_link(near, router, name, texts, options.repeats)
        finally:
            await near.engine.end()
            await life
    return found


def summary(found: list[Measured]) -> list[dict[str, Any]]:
    """A row for each link and size, and medians."""
    rows = []
    for link in LINKS:
        for size in sorted({each.n_tokens for each in found}):
            here = [each for each in found if each.n_tokens == size and each.link in ("", link)]
            rows.append({"link": link, "tokens": size, **_ways(here)})
    return rows


def _ways(found: list[Measured]) -> dict[str, Any]:
    """Medians of each way, which one was chosen, and what the choice lost to the best in hindsight."""
    row: dict[str, Any] = {}
    medians: dict[str, tuple[float, float]] = {}
    for way in ("local", "fetch", "route"):
        of_way = [each for each in found if each.way == way]
        if not of_way:
            row |= {f"{way}_predicted": None, f"{way}_s": None}
            continue
        predicted = statistics.median([each.predicted_s for each in of_way])
        measured = statistics.median([each.measured_s for each in of_way])
        medians[way] = predicted, measured
        row |= {f"{way}_predicted": float(f"{predicted:.3g}"), f"{way}_s": float(f"{measured:.3g}")}
    chosen = min(medians, key=lambda way: medians[way][0])
    best = min(measured for _, measured in medians.values())
    lost = medians[chosen][1] / best - 1
    return row | {"chosen": chosen, "lost_percent": round(100 * lost, 1)}


def notes(found: list[Measured], rows: list[dict[str, Any]]) -> str:
    """What the rows come to, in words."""
    parts = []
    for way in ("local", "fetch", "route"):
        errors = [100 * each.error for each in found if each.way == way]
        parts.append(f"{way}: median error {statistics.median(errors):.1f} %, worst {max(errors):.1f} %")
    lost = [row["lost_percent"] for row in rows]
    parts.append(
        f"the choice lost {statistics.median(lost):.1f} % to the best in hindsight, at most {max(lost):.1f} %"
    )
    return (
        "; ".join(parts)
        + ". Links are emulated by a relay in user space: "
        + ", ".join(f"{name} {mb_s:g} MB/s and {ms:g} ms" for name, (mb_s, ms) in LINKS.items())
        + f". Both servers run on one machine. What would take more than {MAX_FETCH_S:g} s is left out."
    )


def commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def start_far(options: argparse.Namespace) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """The far server, which has room for all prompts, and has read them."""
    words = ["--cache-type", options.cache_type, "-t", str(options.threads), "-c", str(options.ctx_size)]
    parallel = -(-sum(options.sizes) // options.ctx_size) + 1
    command = [sys.executable, "-m", "edgekv", "serve", options.model, "--port", "0", "--json", *words]
    process = subprocess.Popen(
        [*command, "--parallel", str(parallel), "--peer-key", KEY], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    about: dict[str, Any] = json.loads(process.stdout.readline())
    with httpx.Client(base_url=about["address"], timeout=TIMEOUT_S) as client:
        for tokens in prompts(options.sizes).values():
            body = {"prompt": tokens, "max_tokens": 1, "temperature": 0}
            client.post("/v1/completions", json=body).raise_for_status()
    return process, about


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--sizes", type=lambda text: [int(each) for each in text.split(",")], default=list(SIZES)
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ctx-size", type=int, default=8192)
    parser.add_argument("--cache-type", default="q8_0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    process, about = start_far(options)
    try:
        found = asyncio.run(measure(options, about))
    finally:
        process.terminate()
        process.wait()
    rows = summary(found)
    ways = [(way, kind) for way in ("local", "fetch", "route") for kind in ("_predicted", "_s")]
    titles = {"_predicted": "predicted, s", "_s": "s"}
    result = {
        "title": f"Time to the first token of a prompt that a peer has, three ways: {Path(options.model).name}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "versions": {"llama-cpp-python": version("llama-cpp-python"), "edgekv": version("edgekv")},
        "command": ["python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])],
        "columns": [
            {"key": "link", "title": "link"},
            {"key": "tokens", "title": "tokens"},
            *({"key": way + kind, "title": f"{way} {titles[kind]}"} for way, kind in ways),
            {"key": "chosen", "title": "chosen"},
            {"key": "lost_percent", "title": "lost by the choice", "suffix": " %"},
        ],
        "rows": rows,
        "notes": notes(found, rows),
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
