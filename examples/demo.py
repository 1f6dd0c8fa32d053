"""The demo: SmolLM2-135M reads a few pages and is asked about them, before and after its KV cache was made small.

Runs the `edgekv` commands that a user would run; every figure is measured here and now, and taken from their JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bars import Chart, as_text, draw
from commands import console, edgekv, smollm2, step
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HEALED = ROOT / "models" / "smollm2-135m-instruct-256-q4_0.safetensors"
LOSS_TEXT, OTHER_TEXT = HERE / "demo.txt", ROOT / "edgekv" / "text" / "other_kinds.txt"
PAGES = (ROOT / "docs" / "sessions.md", OTHER_TEXT, LOSS_TEXT)
QUESTION = "How is rain measured with a glass and a ruler? Answer from the text."  # which LOSS_TEXT tells
CONTEXT = 8192  # tokens: what the model was trained for
LOSS_TOKENS = 1024


@dataclass(frozen=True)
class Candidate:
    """A model with a cache type, and with llama.cpp's attention or EdgeKV's."""

    model: Path
    name: str
    cache_type: str
    kernel: str = "edgekv"

    @property
    def title(self) -> str:
        """Name, cache type and attention, each on a line."""
        return f"{self.name}\n{self.cache_type}\n{'kernel' if self.kernel == 'edgekv' else 'stock'}"


@dataclass(frozen=True)
class Result:
    """What a candidate answered (the JSON of `edgekv chat`) and what it loses (of `edgekv verify`)."""

    candidate: Candidate
    chat: dict[str, Any]
    loss: dict[str, Any]


def main() -> None:
    """Convert, ask, pack, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what the demo makes")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    introduce()
    step("kernel: attention for llama.cpp that reads a long cache once for all heads")
    edgekv("kernel")
    step("convert: the attention is rewritten so that it caches less")
    original, converted = smollm2(), folder / "smollm2-135m-latent.gguf"
    edgekv("convert", original, "-o", converted, "--healed", HEALED, "--text", OTHER_TEXT, "--force")
    today = Candidate(original, "original", "f16", "stock")
    others = (
        Candidate(original, "original", "f16"),
        Candidate(original, "original", "q4_0"),
        Candidate(converted, "converted", "q4_0"),
    )
    losses = [lost(candidate) for candidate in others]
    pages = written_pages(folder / "pages.txt")
    answers = [
        asked(candidate, "--system", pages.read_text(encoding="utf-8")) for candidate in (today, *others)
    ]
    results = list(map(Result, (today, *others), answers, (losses[0], *losses)))
    report(results, answer_from_pack(others[-1], pages), folder)


def introduce() -> None:
    """What a newcomer has to know before the figures."""
    console.print(
        "\nWhat a language model has read, it keeps in its [bold]KV cache[/]. For SmolLM2-135M and "
        f"{CONTEXT:,} tokens llama.cpp's is larger than all the weights. EdgeKV rewrites a model so that its cache is "
        "small. Here the original and the rewritten model read a few pages and answer a question about them; it "
        "takes three minutes or so, and every figure is measured on this machine.\n",
        highlight=False,
    )


def written_pages(path: Path) -> Path:
    """The pages in one file, which ends as a pack ends a document."""
    path.write_text(
        "".join(page.read_text(encoding="utf-8").strip() + "\n\n" for page in PAGES), encoding="utf-8"
    )
    return path


def lost(candidate: Candidate) -> dict[str, Any]:
    """How far a candidate's predictions are from the original's in float32, on a text."""
    step(f"compare: {one_line(candidate)} with the original in float32")
    text = ("--text", LOSS_TEXT, "--text-tokens", LOSS_TOKENS, "--tolerance", 1e9)
    return edgekv("verify", smollm2(), candidate.model, "--cache-type", candidate.cache_type, *text)


def asked(candidate: Candidate, *pages_from: object) -> dict[str, Any]:
    """Ask the question; the answer is greedy."""
    step(f"ask: {one_line(candidate)}")
    how = ("-c", CONTEXT, "--cache-type", candidate.cache_type, "--kernel", candidate.kernel, "--temp", 0)
    return edgekv("chat", candidate.model, "-p", QUESTION, "--max-tokens", 60, *how, *pages_from)


def answer_from_pack(candidate: Candidate, pages: Path) -> dict[str, Any]:
    """Read the pages once into a pack, and ask the same question with it."""
    step("pack: the pages are read once and kept")
    pack = pages.with_suffix(".pack")
    edgekv("pack", pages, "-m", candidate.model, "-o", pack, "--cache-type", candidate.cache_type, "--force")
    return asked(candidate, "--pack", pack)


def one_line(candidate: Candidate) -> str:
    return candidate.title.replace("\n", ", ")


def report(results: Sequence[Result], packed: dict[str, Any], folder: Path) -> None:
    """Sentences first, then all figures, the picture, the answers, and where to go from here."""
    out = Console()
    out.print(sentences(results, packed), highlight=False)
    out.print(table(results, packed))
    panels = charts(results, packed)
    picture = folder / "demo.png"
    if draw(panels, f"SmolLM2-135M-Instruct with {read(results):,} tokens in the cache", picture):
        out.print(f"picture: {picture}")
    else:
        out.print(as_text(panels), highlight=False)
    said = {"original": results[0].chat, "converted": results[-1].chat, "from the pack": packed}
    for name, answer in said.items():
        out.print(f"\n[bold]{name}:[/] {answer['text'].strip()}", highlight=False)
    command = Path(sys.executable).parent / "edgekv"
    out.print(
        "\nStock: llama.cpp's own attention; kernel: EdgeKV's. KL says how far predictions are from those of the "
        "original in float32: 0 is the same. The converted model caches 256 values (192 + 64) per token and layer "
        "where the original caches 384; it was healed for the q4_0 cache, that is, distilled from the original "
        "(models/README.md).\n"
        f"Talk to it: {command} chat {results[-1].candidate.model} --cache-type q4_0",
        highlight=False,
    )


def read(results: Sequence[Result]) -> int:
    """Tokens of the prompt."""
    return int(results[0].chat["n_prefilled"])


def sentences(results: Sequence[Result], packed: dict[str, Any]) -> str:
    """What it all comes to."""
    before, after = results[0].chat, results[-1].chat
    return (
        f"\n[bold]SmolLM2-135M-Instruct, {read(results):,} tokens of text and a question, from stock llama.cpp to "
        "EdgeKV:[/]\n"
        f"  memory    {megabytes(before)} MB of cache for {CONTEXT:,} tokens -> {megabytes(after)} MB\n"
        f"  answering {before['decode_tps']:.0f} tokens/s -> {after['decode_tps']:.0f} tokens/s\n"
        f"  reading   {before['ttft_s']:.0f} s until the first word -> {after['ttft_s']:.0f} s; "
        f"{packed['ttft_s']:.1f} s where the pages were packed before\n"
        f"  its price a KL of {results[-1].loss['kl']:.3f} nats per token to the original; llama.cpp's own q4_0 cache "
        f"costs {results[-2].loss['kl']:.3f} and takes {megabytes(results[-2].chat)} MB\n"
    )


def megabytes(chat: dict[str, Any]) -> str:
    return f"{chat['cache_nbytes'] / 1e6:.0f}"


def table(results: Sequence[Result], packed: dict[str, Any]) -> Table:
    """All figures, a column per candidate."""
    made = Table("", title=f"llama.cpp on this machine, {read(results):,} tokens in the cache")
    for result in results:
        made.add_column(result.candidate.title, justify="right")

    def row(name: str, figure: Callable[[Result], str]) -> None:
        made.add_row(name, *map(figure, results))

    row(f"cache for {CONTEXT:,}, MB", lambda r: megabytes(r.chat))
    row("prefill, tokens/s", lambda r: f"{r.chat['prefill_tps']:.0f}")
    row("first token, s", lambda r: f"{r.chat['ttft_s']:.1f}")
    made.add_row("  from a pack, s", "", "", "", f"{packed['ttft_s']:.1f}")
    row("decode, tokens/s", lambda r: f"{r.chat['decode_tps']:.0f}")
    row("KL, nats per token", lambda r: f"{r.loss['kl']:.4f}")
    row("same next token", lambda r: f"{r.loss['argmax_agreement']:.1%}")
    row("peak memory, MB", lambda r: f"{r.chat['engine_peak_rss_nbytes'] / 1e6:.0f}")
    return made


def charts(results: Sequence[Result], packed: dict[str, Any]) -> list[Chart]:
    """The picture's panels."""

    def chart(title: str, figure: Callable[[Result], float]) -> Chart:
        return Chart(title, {one_line(result.candidate): figure(result) for result in results})

    first = chart("first token after, s", lambda r: r.chat["ttft_s"])
    return [
        chart(f"cache for {CONTEXT:,} tokens, MB", lambda r: r.chat["cache_nbytes"] / 1e6),
        Chart(first.title, {**first.values, "from a pack": packed["ttft_s"]}),
        chart("decode, tokens/s", lambda r: r.chat["decode_tps"]),
        chart("loss: KL, nats per token", lambda r: r.loss["kl"]),
    ]


if __name__ == "__main__":
    main()
