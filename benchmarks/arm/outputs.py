"""What one machine makes of a fixed prompt, to hold two machines' answers against each other.

    python benchmarks/arm/outputs.py run MODEL BACKEND OUT.npz [N_GREEDY]
    python benchmarks/arm/outputs.py compare A.npz B.npz

`run` writes the logits of every prompt token and the greedy tokens after it; `compare` prints the mean and the
largest KL(A || B) over the prompt's positions in nats and leaves with 1 if the mean exceeds 1e-4 or a token differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.backends.open import KINDS, open_backend

PROMPT = [1, 4093, 198, 504, 2120, 282, 253, 1165, 2391, 3542, 314, 1343, 28, 284, 357, 314]
MAX_KL = 1e-4


def run(model: Path, kind: str, out: Path, n_greedy: int) -> None:
    """Logits (T, vocab) float32 and greedy tokens (n_greedy,)."""
    backend = open_backend(model, next(k for k in KINDS if k == kind), n_ctx=256)
    logits = backend.prefill_all(PROMPT)
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < n_greedy:
        greedy.append(int(backend.decode(greedy[-1]).argmax()))
    np.savez(out, logits=logits, greedy=greedy)
    backend.close()


def compare(a: Path, b: Path) -> bool:
    """Print how far b's answers lie from a's; whether they count as equal."""
    first, second = np.load(a), np.load(b)
    kl = kl_nats(first["logits"], second["logits"])
    same = first["greedy"].tolist() == second["greedy"].tolist()
    result = {
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "positions": len(kl),
        "same_greedy": same,
        "n_greedy": len(first["greedy"]),
    }
    print(json.dumps(result))
    return same and result["mean_kl"] <= MAX_KL


def kl_nats(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(p || q) by position, (T,)."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (p_logits, q_logits))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int((*sys.argv, "16")[5]))
    else:
        sys.exit(0 if compare(Path(sys.argv[2]), Path(sys.argv[3])) else 1)
