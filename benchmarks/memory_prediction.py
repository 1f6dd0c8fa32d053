"""Predicted against measured memory on this machine, for several models, cache types and contexts.

    python benchmarks/memory_prediction.py GQA.gguf MLA.gguf

Prints a Markdown table of the peak RSS of the engine's process. Bar: within 3 % each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgekv.backends.llama_cpp.footprint import footprint, repacked_nbytes
from edgekv.devices.bench import run as bench
from edgekv.devices.predict.plan import MIB, measured_runtime_nbytes
from edgekv.devices.sensors.machine import probe
from edgekv.models.gguf.source import GGUFSource

COMBINATIONS = (
    ("f16", 512, 200),
    ("f16", 2048, 600),
    ("q8_0", 2048, 200),
    ("q4_0", 4096, 200),
    ("f16", 8192, 600),
)


def main() -> None:
    """Measure and print row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    models: list[Path] = parser.parse_args().models
    runtime, isa = measured_runtime_nbytes(), probe()[0].isa_flags
    print(f"Runtime before any model: {runtime / MIB:.1f} MiB\n")
    print("| model | cache | context | filled to | measured peak MiB | predicted MiB | error |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for path in models:
        source = GGUFSource(path)
        weights = sum(source.nbytes(name) for name in source.names())
        copies = repacked_nbytes(source, isa)
        for cache_type, n_ctx, depth in COMBINATIONS:
            settings = bench.BenchSettings(
                depths=(0, depth), n_prompt=64, n_gen=2, repeats=1, threads=1, context=n_ctx, with_hash=False
            )
            memory = bench.run([bench.Candidate(path, cache_type)], settings).runs[0].memory
            if memory is None:
                raise SystemExit(f"{path}: the bench measured no memory on this system")
            said = footprint(source.spec, weights, cache_type, n_ctx, 512, copies, depth, runtime).rss_nbytes
            error = said / memory.peak_rss_nbytes - 1
            print(
                f"| {path.stem} | {cache_type} | {n_ctx} | {depth} | {memory.peak_rss_nbytes / MIB:.1f} | "
                f"{said / MIB:.1f} | {error:+.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
