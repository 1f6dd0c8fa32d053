"""Where a token's time goes on the card: python token_profile.py MODEL.gguf DEPTH [CACHE_TYPE]

Prints the time of every kernel that llama.cpp launches for one decoded token at this depth, as JSON. PyTorch's
profiler (CUPTI) sees the kernels of all libraries of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from edgekv.backends.llamacpp import LlamaCppBackend

TOKENS = 8


def main() -> None:
    path, depth, cache_type = Path(sys.argv[1]), int(sys.argv[2]), (*sys.argv, "f16")[3]
    backend = LlamaCppBackend(path, n_ctx=depth + 2 * TOKENS + 8, cache_type=cache_type)
    backend.prefill([1 + i * 7919 % (backend.n_vocab - 1) for i in range(depth)])
    decode_ms(backend)  # warm: the kernels are loaded, the CUDA graph is captured
    plain_ms = decode_ms(backend)
    backend.trim(depth)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        profiled_ms = decode_ms(backend)
    times_us: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in seen.key_averages():
        times_us[event.key] += event.self_device_time_total / TOKENS
        counts[event.key] += event.count
    report = {
        "model": path.stem,
        "cache_type": cache_type,
        "depth": depth,
        "token_ms": plain_ms,
        "token_ms_profiled": profiled_ms,
        "kernels_ms": sum(times_us.values()) / 1e3,
        "kernels": [
            {"name": name[:160], "us_a_token": round(us, 2), "launches_a_token": counts[name] / TOKENS}
            for name, us in times_us.most_common(25)
            if us
        ],
    }
    print(json.dumps(report, indent=1))
    backend.close()


def decode_ms(backend: LlamaCppBackend) -> float:
    """Milliseconds a token, over TOKENS tokens; the cache is as deep afterwards as before."""
    depth = backend.n_past
    start = time.perf_counter()
    for token in range(1, TOKENS + 1):
        backend.decode(token).argmax()
    taken = time.perf_counter() - start
    backend.trim(depth)
    return 1e3 * taken / TOKENS


if __name__ == "__main__":
    main()
