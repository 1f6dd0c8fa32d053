"""How far the kernel is from what this machine's cores and memory could do at best, per cached row, layer and token.

    python benchmarks/kernel_floor.py -o benchmarks/results/kernel-floor.json

Attention over a cached row is H * (K + V) multiply-adds; H * (2 r + P) for a latent of r and a rope key of P values.
The floor is the longer of its arithmetic at peak (products of whole numbers where the kernel uses them for scores,
float32 for the rest) and the row's bytes at the bandwidth that a plain sum reads. Peaks are measured as well, by loops
that stay in registers and the L1 cache; all cases in turns, medians of --rounds rounds. 30 layers, so that rows come
from memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekv.backends.llama_cpp.kernel.build import FLAGS, HERE, _compiler
from edgekv.quant.formats import FORMATS

SOURCE = Path(__file__).with_name("kernel") / "floor.cpp"
SHAPES = {  # heads, KV heads, K, V
    "192+64": (9, 1, 256, 192),
    "64+64": (9, 1, 128, 64),
    "original (9 heads on 3 of 64)": (9, 3, 64, 64),
    "DeepSeek-V2-Lite (512+64)": (16, 1, 576, 512),
}
TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
LAYERS = 30
COLUMNS = {
    "model": "model",
    "cache": "cache",
    "tokens": "tokens at once",
    "ns": "ns per row",
    "floor_ns": "floor, ns",
    "times_floor": "times the floor",
    "bound": "bound by",
    "f32_percent": "of the f32 peak",
    "int8_percent": "of the int8 peak",
    "read_percent": "of the bandwidth",
}


def compiled(folder: Path) -> Path:
    """floor.cpp with the kernel's sources, for this machine."""
    program = folder / "floor"
    flags = [flag for flag in FLAGS if flag != "-shared"]
    sources = [str(path) for path in (SOURCE, HERE / "attention.cpp", HERE / "rows.cpp")]
    subprocess.run([_compiler(), *flags, f"-I{HERE}", *sources, "-o", str(program)], check=True)
    return program


def ask(program: Path, *arguments: object) -> dict[str, Any]:
    """What the program prints."""
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(
    case: tuple[str, str, int], runs: list[dict[str, Any]], peaks: dict[str, float], options: Any
) -> dict[str, Any]:
    """A row of the table."""
    model, cache, tokens = case
    heads, kv_heads, width_k, width_v = SHAPES[model]
    ns = statistics.median(run["ns"] for run in runs)
    values = width_k if kv_heads == 1 else kv_heads * (width_k + width_v)
    nbytes = FORMATS[cache].nbytes(values)
    score_peak = peaks["int8"] if runs[0]["whole"] else peaks["f32"]
    arithmetic_ns = 1e9 * heads * (width_k / score_peak + width_v / peaks["f32"])
    bytes_ns = 1e9 * nbytes / peaks["read"] / tokens
    floor_ns = max(arithmetic_ns, bytes_ns)
    multiply_adds = heads * (width_k + width_v) / ns * 1e9
    return {
        "model": model,
        "cache": cache,
        "tokens": tokens,
        "ns": digits(ns),
        "floor_ns": digits(floor_ns),
        "times_floor": digits(ns / floor_ns),
        "bound": "bytes" if bytes_ns > arithmetic_ns else "arithmetic",
        "f32_percent": round(100 * multiply_adds / peaks["f32"]),
        "int8_percent": round(100 * multiply_adds / peaks["int8"]),
        "read_percent": round(100 * nbytes / ns * 1e9 / peaks["read"] / tokens),
    }


def digits(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """Measure every case in turns and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=7600, help="cached rows per layer")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", default="not said")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    cases = [(m, cache, n) for m in options.models for cache in options.types for n in options.tokens]
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    peaks: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for i in range(options.rounds):
            peaks.append(ask(program, "peaks", options.threads))
            for model, cache, tokens in cases:
                # Fewer rows with many tokens: a pass is not to take minutes.
                layers = max(1, options.layers // 8) if tokens > 1 else options.layers
                numbers = (FORMATS[cache].ggml_id, *SHAPES[model], tokens, options.depth, layers)
                found[model, cache, tokens].append(ask(program, "node", options.threads, *numbers))
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
    best = {name: statistics.median(peak[name] for peak in peaks) for name in peaks[0]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    suffixed = {name: {"suffix": " %"} for name in COLUMNS if name.endswith("percent")}
    result = {
        "title": "The attention kernel beside the peaks of the machine",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.strip(),
        "machine": options.machine,
        "versions": None,
        "command": [" ".join(["python benchmarks/kernel_floor.py", *sys.argv[1:]])],
        "columns": [{"key": key, "title": title, **suffixed.get(key, {})} for key, title in COLUMNS.items()],
        "rows": [row(case, runs, best, options) for case, runs in found.items()],
        "notes": f"{options.threads} threads, {options.depth} cached rows per layer. "
        f"Peaks: {best['f32'] / 1e9:.0f} f32 and "
        f"{best['int8'] / 1e9:.0f} int8 multiply-adds per ns, {best['read'] / 1e9:.1f} GB/s. "
        "The floor takes float32 for "
        "all but products of whole numbers; a CPU that multiplies pairs of bfloat16 can be below it.",
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["rows"], indent=1))


if __name__ == "__main__":
    main()
