"""Throughput and memory of export and quantize on a synthetic checkpoint, beside llama.cpp's own quantization.

    python benchmarks/quantize_throughput.py FOLDER [--gigabytes 4] [--dtype F32] [--weights q8_0 q4_k_m] [--rounds 3]

FOLDER receives a random Llama in four shards (kept for the next run), and for a while a GGUF of it. In turns, each
in a fresh process: `edgekv export gguf` as stored; for each of --weights llama_model_quantize with its defaults on that
GGUF, `edgekv quantize` on the GGUF and on the folder. MB/s are of input, 10^6 bytes; processor time is what other work
disturbs least; RSS is the largest sum over a process and its children, shared pages counted in each. Files are in the
page cache where they fit.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DIM, FFN, HEADS, KV_HEADS, VOCAB, N_SHARDS = 2048, 8192, 32, 8, 32000, 4
DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
LLAMA = """
import os, sys
import llama_cpp as api
from edgekv.quant.formats import PRESETS
quiet = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(quiet, None)
params = api.llama_model_quantize_default_params()
params.ftype, params.nthread = PRESETS[sys.argv[3]].file_type, int(sys.argv[4])
sys.exit(api.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), params))
"""


def shapes(n_layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama, in file order."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, DIM)}
    head = DIM // HEADS
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
        for name, rows in (("q", DIM), ("k", KV_HEADS * head), ("v", KV_HEADS * head), ("o", DIM)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (rows, DIM)
        found |= {f"{prefix}mlp.{name}_proj.weight": (FFN, DIM) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (DIM, FFN)
    return found | {"model.norm.weight": (DIM,), "lm_head.weight": (VOCAB, DIM)}


def make_checkpoint(folder: Path, nbytes: float, dtype: str) -> None:
    """A folder of about `nbytes` of random weights, unless it is there."""
    name, size = DTYPES[dtype]
    block = sum(int(np.prod(shape)) for shape in shapes(1).values()) - 2 * VOCAB * DIM
    n_layers = max(1, round((nbytes / size - 2 * VOCAB * DIM) / block))
    layout = shapes(n_layers)
    config = {
        "model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN, "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": name,
    }  # fmt: skip
    if (folder / "config.json").exists():
        if json.loads((folder / "config.json").read_text()) != config:
            raise SystemExit(f"{folder} holds another checkpoint; name an empty folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, places, names = np.random.default_rng(0), {}, list(layout)
    for i in range(N_SHARDS):
        shard = f"model-{i + 1:05}-of-{N_SHARDS:05}.safetensors"
        part = names[i * len(names) // N_SHARDS : (i + 1) * len(names) // N_SHARDS]
        write_shard(folder / shard, {tensor: layout[tensor] for tensor in part}, dtype, rng)
        places |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, layout: dict[str, tuple[int, ...]], dtype: str, rng: np.random.Generator) -> None:
    """A safetensors file of random weights; its format is a header in JSON and the tensors one after another."""
    header, end = {}, 0
    for name, shape in layout.items():
        start, end = end, end + int(np.prod(shape)) * DTYPES[dtype][1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in layout.values():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            if dtype == "BF16":
                values = (values.view(np.uint32) >> 16).astype(np.uint16)
            (values.astype(np.float16) if dtype == "F16" else values).tofile(file)


class Run(NamedTuple):
    """What a command took; RSS is the largest sum over it and its children."""

    seconds: float
    cpu_seconds: float
    rss_nbytes: int


def watch(command: list[str]) -> Run:
    """Run a command to its end."""
    started, cpu_before, peak = time.perf_counter(), cpu_seconds(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.Error:
            pass
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{command} failed: {process.stderr.read().decode()[-500:]}")
    return Run(time.perf_counter() - started, cpu_seconds() - cpu_before, peak)


def cpu_seconds() -> float:
    """Processor time of all children that have ended, theirs included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def jobs(folder: Path, weights: list[str], threads: int) -> dict[str, list[str]]:
    """Commands by what the table calls them."""
    whole, out = str(folder / "whole.gguf"), str(folder / "out.gguf")
    edgekv = [str(Path(sys.executable).parent / "edgekv")]
    found = {"export gguf FOLDER": [*edgekv, "export", "gguf", str(folder), "-o", whole, "--force"]}
    for name in weights:
        options = ["-o", out, "--weights", name, "--no-importance", "--force", "-t", str(threads)]
        found[f"{name}: llama_model_quantize GGUF"] = [
            sys.executable,
            "-c",
            LLAMA,
            whole,
            out,
            name,
            str(threads),
        ]
        found[f"{name}: edgekv quantize GGUF"] = [*edgekv, "quantize", whole, *options]
        found[f"{name}: edgekv quantize FOLDER"] = [*edgekv, "quantize", str(folder), *options]
    return found


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dtype", choices=DTYPES, default="F32")
    parser.add_argument("--weights", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    make_checkpoint(args.folder, args.gigabytes * 1e9, args.dtype)
    nbytes = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB of {args.dtype}, {args.rounds} rounds, {args.threads} threads\n")
    found: dict[str, list[Run]] = {}
    for _ in range(args.rounds):
        for name, command in jobs(args.folder, args.weights, args.threads).items():
            found.setdefault(name, []).append(watch(command))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print("| | s: median (all) | MB/s of input | CPU, s | peak RSS, MB |\n| --- | --- | ---: | ---: | ---: |")
    for name, runs in found.items():
        seconds = sorted(run.seconds for run in runs)
        median, cpu = statistics.median(seconds), statistics.median(run.cpu_seconds for run in runs)
        spread, rss = ", ".join(f"{value:.1f}" for value in seconds), max(run.rss_nbytes for run in runs)
        print(
            f"| {name} | {median:.1f} ({spread}) | {nbytes / 1e6 / median:.0f} | {cpu:.1f} | {rss / 1e6:.0f} |"
        )
    for name in ("whole.gguf", "out.gguf"):
        (args.folder / name).unlink()


if __name__ == "__main__":
    main()
