"""Comfort check: the largest of some well-known models that this machine runs at reading speed."""

from __future__ import annotations

from dataclasses import dataclass

from edgekv.backends.llama_cpp.footprint import CELLS, ENGINE_NBYTES, VOCAB_NBYTES
from edgekv.devices.doctor.check import Check
from edgekv.devices.predict.plan import MIB, this_board
from edgekv.devices.predict.speed import Workload, decode_s, load_coefficients
from edgekv.errors import BackendError

COMFORTABLE_TPS = 5.0  # about the speed of reading
COMFORTABLE_CONTEXT = 4096
F16_NBYTES = 2
BUFFERS_NBYTES = 32 * MIB


@dataclass(frozen=True)
class KnownModel:
    """A model as most people run it: 4-bit weights. Shapes from the config.json of its Hugging Face repository."""

    name: str
    weights_nbytes: int
    read_nbytes: int
    flops: float
    n_layers: int
    cache_values: int
    attention_flops: int
    vocab: int
    context_length: int


LADDER = (  # by size; Q4_0 with an 8-bit head
    KnownModel("SmolLM2-135M", 97 * 10**6, 97 * 10**6, 0.27e9, 30, 11520, 69120, 49152, 8192),
    KnownModel("SmolLM2-360M", 229 * 10**6, 229 * 10**6, 0.72e9, 32, 20480, 122880, 49152, 8192),
    KnownModel("Qwen2.5-0.5B", 353 * 10**6, 353 * 10**6, 0.99e9, 24, 6144, 86016, 151936, 32768),
    KnownModel("Llama-3.2-1B", 773 * 10**6, 773 * 10**6, 2.47e9, 16, 16384, 131072, 128256, 131072),
    KnownModel("Llama-3.2-3B", 1917 * 10**6, 1917 * 10**6, 6.43e9, 28, 57344, 344064, 128256, 131072),
    KnownModel("Llama-3.1-8B", 4661 * 10**6, 4365 * 10**6, 15.0e9, 32, 65536, 524288, 128256, 131072),
)


def check_comfort() -> Check:
    """The largest model of LADDER that fits and decodes at reading speed, and its longest context."""
    try:
        board, machine = this_board(LADDER[0].read_nbytes)
    except (BackendError, OSError) as error:
        return Check("comfortable model", "unknown", str(error))
    free = machine.available_nbytes or 0
    c = load_coefficients()[board.kind]
    best: tuple[KnownModel, float, int] | None = None
    for model in LADDER:
        runtime = board.runtime_nbytes + ENGINE_NBYTES + VOCAB_NBYTES * model.vocab
        fixed = model.weights_nbytes + runtime + BUFFERS_NBYTES
        room = int((free * 0.9 - fixed) // (model.cache_values * F16_NBYTES)) // CELLS * CELLS
        context = min(room, model.context_length)
        work = Workload(
            n_layers=model.n_layers,
            weight_flops=model.flops,
            read_nbytes=model.read_nbytes,
            weights="Q4_0",
            cache_nbytes=model.cache_values * F16_NBYTES,
            attention_flops=model.attention_flops,
        )
        tps = 1 / decode_s(work, board, board.cores, COMFORTABLE_CONTEXT / 2, c)
        if context >= COMFORTABLE_CONTEXT and tps >= COMFORTABLE_TPS:
            best = model, tps, context
    bandwidth = f"{max(board.read_gb_s.values()):.1f} GB/s measured"
    if best is None:
        advice = "`edgekv plan MODEL` says what fits; a converted model and a q8_0 cache need less"
        found = f"none at {COMFORTABLE_CONTEXT} tokens ({bandwidth})"
        return Check("comfortable model", "warn", found, advice)
    model, tps, context = best
    speed = f"about {tps:.0f} tokens/s projected"
    found = f"{model.name} in 4 bits: {speed}, context up to {context:,} ({bandwidth})"
    return Check("comfortable model", "ok", found)
