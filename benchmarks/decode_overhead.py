"""What EdgeKV's backend costs over a bare loop on llama_decode: decode tokens/s and peak RSS.

    python benchmarks/decode_overhead.py MODEL.gguf [--rounds 15] [--tokens 64] [--threads 2]

Speed: one process holds a bare loop, the backend, the isolated backend, and chat's token loop on another
isolated backend, and lets them decode the same tokens in turns, greedily, each on its own cache of the
same depth; the ratio is taken round by round, so that a machine that slows down slows them all.
Memory: a fresh process for each. Bars: within 2 % of the bare loop, and the backend within 60 MB of its RSS.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_CTX = 2048
PROMPT = list(range(1000, 1064))
KINDS = ("bare", "in-process", "isolated", "chat")
Step = Callable[[list[int]], int]  # tokens in, the likeliest next one out
Decode = Callable[[int], list[int]]  # so many tokens more


def bare_loop(path: Path, threads: int) -> Step:
    """The least Python that decodes greedily with llama.cpp."""
    import llama_cpp.llama_cpp as api

    from edgekv.backends.llama_cpp.library import repacking_is_safe

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.use_extra_bufts = repacking_is_safe()
    model = api.llama_model_load_from_file(os.fsencode(path), model_params)
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = N_CTX, 512, 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = api.llama_init_from_model(model, params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        pointer = api.llama_get_logits_ith(context, -1)
        values = (ctypes.c_float * n_vocab).from_address(ctypes.addressof(pointer.contents))
        return int(np.frombuffer(values, np.float32).argmax())

    step.keep = quiet  # type: ignore[attr-defined]
    return step


def open_kind(kind: str, path: Path, threads: int) -> tuple[Decode, Any]:
    """A function that decodes n more tokens, its prompt prefilled, and its backend if it has one."""
    if kind == "bare":
        return repeat(bare_loop(path, threads)), None
    from edgekv.backends.base import Backend
    from edgekv.backends.isolated.backend import IsolatedBackend
    from edgekv.backends.open import open_backend

    backend: Backend
    if kind == "in-process":
        backend = open_backend(path, n_ctx=N_CTX, n_threads=threads)
    else:
        backend = IsolatedBackend(path, n_ctx=N_CTX, n_threads=threads)
    if kind == "chat":
        return chat_loop(backend, path), backend

    def step(tokens: list[int]) -> int:
        logits = backend.prefill(tokens) if len(tokens) > 1 else backend.decode(tokens[0])
        return int(logits.argmax())

    return repeat(step), backend


def repeat(step: Step) -> Decode:
    """Greedy decoding, one step after another."""
    token = step(PROMPT)

    def decode(n: int) -> list[int]:
        nonlocal token
        tokens = []
        for _ in range(n):
            tokens.append(token := step([token]))
        return tokens

    return decode


def chat_loop(backend: Any, path: Path) -> Decode:
    """What `edgekv chat` runs: the token loop with sampling and text."""
    from edgekv.chat.generate import Generator
    from edgekv.chat.sampling import Sampler, SamplingParams
    from edgekv.models.gguf.header import read_header
    from edgekv.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(read_header(path).metadata)
    sampler = Sampler(SamplingParams(temperature=0))
    steps = Generator(backend, tokenizer).generate(PROMPT, sampler, stop_ids=())
    next(steps)
    return lambda n: [next(steps).token or 0 for _ in range(n)]


def measure_speed(path: Path, threads: int, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds a token by kind, one value a round."""
    decoders = {kind: open_kind(kind, path, threads)[0] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(rounds):
        texts = set()
        for j in range(len(KINDS)):
            kind = KINDS[(i + j) % len(KINDS)]
            started = time.perf_counter()
            texts.add(tuple(decoders[kind](tokens)))
            seconds[kind].append((time.perf_counter() - started) / tokens)
        assert len(texts) == 1, "the kinds wrote different texts"
    return seconds


def measure_rss(kind: str, path: Path, threads: int, tokens: int) -> dict[str, int | None]:
    """Peak RSS in bytes of a process that decodes a little, and of its engine's child if it has one."""
    from edgekv.backends.isolated.backend import IsolatedBackend
    from edgekv.host.proc import peak_rss_nbytes

    decode, backend = open_kind(kind, path, threads)
    decode(tokens)
    child = backend.peak_rss_nbytes() if isinstance(backend, IsolatedBackend) else None
    return {"own": peak_rss_nbytes(os.getpid()), "child": child}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rss-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rss_of:
        print(json.dumps(measure_rss(args.rss_of, args.model, args.threads, args.tokens)))
        return
    seconds = measure_speed(args.model, args.threads, args.rounds, args.tokens)
    bare = seconds["bare"]
    print(f"{'':12s} {'tokens/s':>9s} {'slower than bare':>24s} {'peak RSS':>10s}")
    for kind in KINDS:
        ratios = sorted(s / b - 1 for s, b in zip(seconds[kind], bare, strict=True))
        quarter = len(ratios) // 4
        spread = f"{ratios[quarter]:+.1%} .. {ratios[-1 - quarter]:+.1%}"
        command = [
            sys.executable,
            __file__,
            str(args.model),
            "--rss-of",
            kind,
            "--threads",
            str(args.threads),
        ]
        rss = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{kind:12s} {1 / statistics.median(seconds[kind]):9.1f} {statistics.median(ratios):+7.1%} "
            f"({spread}) {rss['own'] / 1e6:6.0f} MB"
            + (f" + child {rss['child'] / 1e6:.0f} MB" if rss["child"] else "")
        )


if __name__ == "__main__":
    main()
