"""Tensors of a model as a GGUF of its architecture holds them; edgekv.models.gguf.canonical is the other direction."""

from __future__ import annotations

from functools import partial

import numpy as np

from edgekv.export.gguf.architectures import gguf_arch, is_linear
from edgekv.models.gguf.own import OWN_ARCH
from edgekv.models.gguf.spec import JOINT_KV_B, ROPE_FACTORS, ROPE_FREQS
from edgekv.rewrite.minicpm3 import can_fold, folded
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import ModelSpec, RopeSpec
from edgekv.tensors import joint_kv_b


def file_layout(source: TensorSource) -> TensorSource:
    """The source with what its architecture fuses as one tensor, and rope factors as a tensor."""
    if gguf_arch(source.spec) == OWN_ARCH:
        return source
    if can_fold(source.spec):
        return folded(source)
    spec = source.spec
    rope = spec.layers[0].attention.rope
    factors = _factor_tensors(spec, rope)
    if spec.arch not in (*JOINT_KV_B, "phi3") and not factors:
        return source
    out = LazySource(spec, source.metadata)
    for name in source.names():
        prefix, _, tensor = name.rpartition(".attn_" if ".attn_" in name else ".ffn_")
        if spec.arch in JOINT_KV_B and tensor == "k_b.weight":
            h, r, n = source.shape(name)
            v = source.shape(f"{prefix}.attn_v_b.weight")[1]
            out.add(f"{prefix}.attn_kv_b.weight", (h * (n + v), r), partial(_join_kv_b, source, prefix))
        elif spec.arch in JOINT_KV_B and tensor == "v_b.weight":
            continue
        elif spec.arch == "phi3" and tensor == "gate.weight":
            f, d = source.shape(name)
            out.add(f"{prefix}.ffn_up.weight", (2 * f, d), partial(_join_gate_up, source, prefix))
        elif not (spec.arch == "phi3" and name.endswith(".ffn_up.weight")):
            out.borrow(source, name)
    for name in factors:
        out.add_array(name, np.asarray(rope.factors, np.float32))
    return out


def _factor_tensors(spec: ModelSpec, rope: RopeSpec) -> tuple[str, ...]:
    if not rope.factors or is_linear(rope):
        return ()
    return (ROPE_FREQS,) if spec.arch == "llama" else ROPE_FACTORS


def _join_kv_b(source: TensorSource, prefix: str) -> Array:
    return joint_kv_b(*(source.load(f"{prefix}.attn_{kind}_b.weight") for kind in "kv"))


def _join_gate_up(source: TensorSource, prefix: str) -> Array:
    return np.concatenate([source.load(f"{prefix}.ffn_{kind}.weight") for kind in ("gate", "up")])
