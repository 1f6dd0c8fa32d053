"""Instructions that the kernel executes per cached row on emulated ARM cores, where times mean nothing.

    python benchmarks/kernel/instructions.py            needs aarch64-linux-gnu-g++, gcc and qemu-aarch64 (qemu-user)

The difference of two runs of the tests' driver with S and 2 S rows, by a QEMU plug-in that counts: whatever does not
depend on rows falls out. One layer, 192+64 with 9 heads and the original's 3 KV heads of 64 values for 9 heads;
decode of 1 token, and prefill of 64 per token. FLOPs are those of attention, so that FLOPs per instruction say how
much of the vector units' width is used. Behind the table: what `edgekv plan` takes from it for each kind of machine
(devices/predict/kernel.json), at an assumed number of instructions per cycle.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from edgekv.backends.llama_cpp.kernel.node import Node
from edgekv.devices.predict.kernel import shared_by

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "backends"))
from test_kernel import ARM_COMPILER, compiled_program, problem  # noqa: E402

BUILDS = {"plain NEON (Pi 3, 4, Zero 2 W)": "armv8-a", "dotprod (Pi 5)": "armv8.2-a+dotprod"}
KINDS = {"plain NEON (Pi 3, 4, Zero 2 W)": ("arm", 1.0), "dotprod (Pi 5)": ("arm-dotprod", 2.0)}  # per cycle
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
ROWS = 512


def instructions(command: list[str], node: Node) -> int:
    """Instructions of the whole program, on one thread."""
    done = subprocess.run(
        command, input=problem(node, threads=1, mass=False), capture_output=True, check=True
    )
    found = re.search(rb"instructions (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def per_row(command: list[str], node: Node) -> float:
    """Instructions per cached row and token; a few dozen per row copy it from standard input."""
    twice = replace(
        node,
        k=np.concatenate([node.k, node.k], axis=2),
        v=None if node.v is None else np.concatenate([node.v, node.v], axis=2),
    )
    counts = [instructions(command, n) for n in (node, twice)]
    return (counts[1] - counts[0]) / node.k.shape[2] / node.q.shape[2]


def nodes(kind: GGMLType, tokens: int) -> dict[str, Node]:
    """A latent's and the original's node."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    latent = Node(noise(1, 9, tokens, 256), noise(1, 1, ROWS, 256), None, kind, kind, 192)
    k, v = noise(1, 3, ROWS, 64), noise(1, 3, ROWS, 64)
    return {"192+64": latent, "original": Node(noise(1, 9, tokens, 64), k, v, kind, kind, 64)}


def coefficients(counts: dict[tuple[str, str], list[float]], ipc: float) -> dict[str, dict[str, float]]:
    """FLOPs per cycle by kind of attention and cycles per value by cache type, of decode's and prefill's counts."""
    flops: dict[str, list[float]] = {}
    cycles: dict[str, list[float]] = {}
    for (model, cache), (decode, prefill) in counts.items():
        kind, values, all_flops, group = {"192+64": ("mla", 256, 8064, 9), "original": ("gqa", 384, 2304, 3)}[
            model
        ]
        reading = (decode - prefill) / (1 - 1 / shared_by(64, group))
        flops.setdefault(kind, []).append(all_flops / (decode - reading) * ipc)
        cycles.setdefault(cache, []).append(reading / values / ipc)
    by_type = {
        cache: statistics.mean(found) for cache, found in cycles.items() if cache not in ("f32", "bf16")
    }
    by_type["quantized"] = max(cost for cache, cost in by_type.items() if cache != "f16")
    return {
        "flops_per_cycle": {kind: float(f"{statistics.median(x):.3g}") for kind, x in flops.items()},
        "cycles_per_value": {cache: float(f"{x:.3g}") for cache, x in by_type.items()},
    }


def main() -> None:
    """Print the table and the coefficients."""
    with tempfile.TemporaryDirectory() as folder:
        counter = Path(folder) / "count.so"
        source = str(HERE / "count_instructions.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", str(counter)], check=True)
        print("| build | model | cache | decode | FLOPs per instruction | prefill | FLOPs per instruction |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
        for build, arch in BUILDS.items():
            program = compiled_program(Path(folder), ARM_COMPILER, f"-march={arch}", "-static")
            counts: dict[tuple[str, str], list[float]] = {}
            command = ["qemu-aarch64", "-plugin", str(counter), str(program)]
            for name in TYPES:
                by_tokens = [nodes(GGMLType[name], tokens) for tokens in (1, 64)]
                for model in by_tokens[0]:
                    cells = []
                    for node in (found[model] for found in by_tokens):
                        count = per_row(command, node)
                        counts.setdefault((model, name.lower()), []).append(count)
                        flops = 2 * node.q.shape[1] * (node.q.shape[3] + node.width_v)
                        cells += [f"{count:,.0f}", f"{flops / count:.2f}"]
                    print("|", " | ".join([build, model, name.lower(), *cells]), "|", flush=True)
            kind, ipc = KINDS[build]
            print(f"\n{kind}, {ipc:g} instructions per cycle:", json.dumps(coefficients(counts, ipc)), "\n")


if __name__ == "__main__":
    main()
