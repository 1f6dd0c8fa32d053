"""The check of a built kernel against NumPy: `python -m edgekv.backends.llama_cpp.kernel.check FILE`, exit code 0 or 1.

It runs in a process of its own, since a build for another CPU dies of an illegal instruction.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from edgekv.backends.llama_cpp.kernel.node import (
    BFLOAT16,
    EIGHT_BITS,
    Node,
    attend,
    load_backend,
    rounded,
    rounding,
    twin,
)

# Relative errors: in float32, where products of whole numbers are exact, and with factors rounded to bfloat16.
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-5, 6e-3
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")


def error(path: Path, backend: Any, node: Node) -> float:
    """How far a build is from NumPy for one node, of what is tolerable for it: 1 at most.

    NumPy is given the queries that the build multiplies by, where it rounds them to 8 bits.
    """
    rounds = rounding(path, node)
    wanted = twin(replace(node, q=rounded(node.q)) if rounds & EIGHT_BITS else node)
    relative = float(np.linalg.norm(attend(backend, node) - wanted) / np.linalg.norm(wanted))
    return relative / tolerance(rounds)


def tolerance(rounds: int) -> float:
    """The relative error that is tolerable where a build rounds so (edgekv.backends.llama_cpp.kernel.node.rounding)."""
    return TOLERANCE_BFLOAT16 if rounds & BFLOAT16 else TOLERANCE


def worst_error(path: Path) -> float:
    """The largest `error` over a latent and a GQA node of every type, decoding and prefilling."""
    backend = load_backend(path, n_threads=2)
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    worst = 0.0
    for kind in (GGMLType[name] for name in KINDS):
        for tokens in (1, 19):
            mask = np.where(np.arange(700) > 650 + np.arange(tokens)[:, None], -np.inf, 0.0)[None, None]
            latent = Node(
                noise(1, 9, tokens, 96), noise(1, 1, 700, 96), None, kind, kind, 64, mask, scale=0.1
            )
            keys, values = noise(1, 2, 700, 64), noise(1, 2, 700, 64)
            gqa = Node(noise(1, 6, tokens, 64), keys, values, kind, kind, 64, mask, scale=0.125)
            for node in (latent, gqa):
                worst = max(worst, error(path, backend, node))
    return worst


if __name__ == "__main__":
    worst = worst_error(Path(sys.argv[1]))
    if not worst <= 1:
        sys.exit(f"it differs from NumPy by {worst:.1e} times what is tolerable")
