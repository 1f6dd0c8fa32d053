"""Memory of a server with two full sessions: resident and proportional bytes of both its processes.

    python benchmarks/serve/memory.py MODEL --tokens 4000 -- -c 4096 --cache-type q4_0 -t 1

The sessions are put under --sessions as files of rows of other tokens: what is in them changes no sizes, and a prefill
would take minutes. The server reads them, and answers behind both at once. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from load import Served, ask

from edgekv.backends.open import model_identity, open_sequences
from edgekv.backends.sequences import Piece
from edgekv.cache.rows import CacheRows
from edgekv.cache.rows_file import Header, write_rows_file
from edgekv.host.proc import status_nbytes
from edgekv.serve.engine.disk import NoNotes

N_SESSIONS, N_ROWS = 2, 100


def some_rows(model: Path, cache_type: str) -> CacheRows:
    """Rows of a few tokens."""
    engine = open_sequences(model, n_ctx=256, cache_type=cache_type, n_threads=1)
    tokens = np.random.default_rng(0).integers(1000, 9000, N_ROWS).tolist()
    engine.run([Piece(0, 0, tokens, logits=False)])
    rows = engine.save(0)
    engine.close()
    return rows


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000, help="of each session, a multiple of 100")
    arguments, rest = parser.parse_known_args()
    options = [option for option in rest if option != "--"]
    cache_type = options[options.index("--cache-type") + 1] if "--cache-type" in options else "f16"
    rows = some_rows(arguments.model, cache_type)
    header = Header.of("edgekv.prefix", model_identity(arguments.model), rows.layout)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1000, 9000, arguments.tokens).tolist() for _ in range(N_SESSIONS)]
    whole = CacheRows.join(rows.layout, [rows] * (arguments.tokens // N_ROWS))
    with tempfile.TemporaryDirectory() as folder:
        for i, prompt in enumerate(prompts):
            write_rows_file(Path(folder) / f"{i:016x}.prefix", header, prompt, whole, NoNotes())
        served = Served(str(arguments.model), ["--parallel", str(N_SESSIONS), "--sessions", folder, *options])
        report: dict[str, Any] = {"command": served.command[2:], "at the start": served.memory()}
        try:
            with served.client() as client, ThreadPoolExecutor(N_SESSIONS) as pool:
                answers = list(pool.map(lambda prompt: ask(client, [*prompt, 7], 30), prompts))
            report["usage"] = [answer["usage"] for answer in answers]
            report["behind both"] = found = served.memory()
            for kind in ("rss", "pss"):
                report[kind] = found[f"server_{kind}"] + found[f"engine_{kind}"]
            report["peak_rss"] = {
                name: status_nbytes(process.pid).get("VmHWM") for name, process in served.processes.items()
            }
        finally:
            served.end()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
