"""Decoder as one ONNX graph, which serves prefill (many tokens) and decode (one) alike."""

from __future__ import annotations

import numpy as np

from edgekv.export.onnx.attention import AttentionNodes, GroupedAttention, GroupedInputs, skip_norm
from edgekv.export.onnx.graph import GraphWriter, Value
from edgekv.export.onnx.latent import Int8LatentAttention, LatentAttention, LatentInputs
from edgekv.export.onnx.weights import Bits, Embedding, LatentCache, Weights, at_least_8, linear
from edgekv.progress import Progress
from edgekv.reference.model import BlockWeights, load_block
from edgekv.rewrite.int8_rows import RowBalance
from edgekv.source import TensorSource
from edgekv.spec import GQA, AttentionSpec, FFNKind, ModelSpec

ALL_LOGITS = 2**31  # more than any context holds
POST_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")
BITS: dict[Weights, Bits] = {"f32": 32, "int8": 8, "int4": 4}


def add_decoder(
    g: GraphWriter, source: TensorSource, weights: Weights, cache: LatentCache, progress: Progress
) -> None:
    """Add a model's graph: tokens, mask, positions and cache in, logits and cache out.

    Inputs are named as Hugging Face exports name them. `num_logits_to_keep` asks for the logits of the last
    few tokens only; a caller may leave it out and get all. So may `n_evicted` be left out: how many tokens before these
    have no slot in the cache any more, so that new rows go that far in front of their positions.
    """
    spec, bits = source.spec, BITS[weights]
    ids = g.input("input_ids", np.int64, (1, "sequence_length"))
    mask = g.input("attention_mask", np.int64, (1, "total_length"))
    position_ids = g.input("position_ids", np.int64, (1, "sequence_length"))
    kept = g.optional_input("num_logits_to_keep", np.array([ALL_LOGITS], np.int64))
    n_evicted = g.optional_input("n_evicted", np.zeros(1, np.int64))
    slots = g.op("Sub", g.op("Reshape", position_ids, g.ints(-1)), n_evicted)  # (T,)
    attentions = _attentions(g, spec, cache, mask, position_ids, slots)
    # The token table and the head feel 4 bits most and are used by every token: 8, as llama.cpp's presets do.
    table_bits = at_least_8(bits)
    table = Embedding(g, "embedding", source.load("token_embd.weight"), table_bits)
    x = table.look_up(ids)
    if spec.embedding_scale != 1.0:
        x = g.op("Mul", x, g.scalar(spec.embedding_scale))
    delta = None
    balance = RowBalance(source) if cache == "int8" else None
    for layer in range(spec.n_layers):
        w = load_block(source, layer)
        if balance is not None:
            balance.apply(w, layer)
        x, delta = _block(g, spec, w, layer, attentions[layer], x, delta, bits)
        progress(layer + 1, spec.n_layers)
    start = g.op("Neg", kept)
    x, delta = (g.op("Slice", part, start, g.ints(ALL_LOGITS), g.ints(1)) for part in (x, delta))
    # A cap's division goes with the scale into the norm's weight: the logits are far more values.
    scale = spec.logit_scale / (spec.logit_softcap or 1.0)
    norm = g.weight("output_norm", source.load("output_norm.weight") * np.float32(scale))
    hidden, _ = skip_norm(g, x, delta, norm, spec.norm_eps)
    if spec.tied_embeddings:
        logits = table.head(hidden)
    else:
        logits = linear(g, hidden, "head", source.load("output.weight"), table_bits)
    if spec.logit_softcap:
        logits = g.op("Mul", g.op("Tanh", logits), g.scalar(spec.logit_softcap))
    g.output(logits, "logits", np.float32, (1, "logits_length", spec.vocab), first=True)


def _attentions(
    g: GraphWriter, spec: ModelSpec, cache: LatentCache, mask: Value, position_ids: Value, slots: Value
) -> list[AttentionNodes]:
    """The attention of each layer; layers that are alike share one."""
    found: dict[AttentionSpec, AttentionNodes] = {}
    grouped: GroupedInputs | None = None
    latent: LatentInputs | None = None
    for layer in spec.layers:
        attention = layer.attention
        if attention in found:
            continue
        if isinstance(attention, GQA):
            grouped = grouped or GroupedInputs(g, position_ids, slots, spec.context_length)
            found[attention] = GroupedAttention(g, attention, spec.norm_eps, grouped)
        else:
            latent = latent or LatentInputs(g, mask, position_ids, slots, spec.context_length)
            kind = Int8LatentAttention if cache == "int8" else LatentAttention
            found[attention] = kind(g, attention, spec.norm_eps, latent)
    return [found[layer.attention] for layer in spec.layers]


def _block(
    g: GraphWriter,
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    attention: AttentionNodes,
    x: Value,
    delta: Value | None,
    bits: Bits,
) -> tuple[Value, Value]:
    """A pre-norm block. The residual stream is x + delta, None at first: each norm does the addition.

    The residual scale goes into the two matrices that write to the stream, or the norms behind them.
    """
    name, here, eps = f"layers.{layer}", spec.layers[layer], spec.norm_eps
    writers = POST_NORMS if here.post_norms else ("attn_output.weight", "ffn_down.weight")
    for writer in writers:
        w[writer] = w[writer] * np.float32(spec.residual_scale)
    normed, x = _norm(g, x, delta, g.weight(f"{name}.attn_norm", w["attn_norm.weight"]), eps)
    delta = attention.add(normed, w, layer, bits)
    if here.post_norms:
        delta = _rms_norm(g, delta, g.weight(f"{name}.post_attn_norm", w[POST_NORMS[0]]), eps)
    normed, x = _norm(g, x, delta, g.weight(f"{name}.ffn_norm", w["ffn_norm.weight"]), eps)
    fed = _feed_forward(g, normed, w, here.ffn, f"{name}.ffn", bits)
    if here.post_norms:
        fed = _rms_norm(g, fed, g.weight(f"{name}.post_ffn_norm", w[POST_NORMS[1]]), eps)
    return x, fed


def _norm(g: GraphWriter, x: Value, delta: Value | None, weight: Value, eps: float) -> tuple[Value, Value]:
    if delta is not None:
        return skip_norm(g, x, delta, weight, eps)
    return _rms_norm(g, x, weight, eps), x


def _rms_norm(g: GraphWriter, x: Value, weight: Value, eps: float) -> Value:
    return g.op("RMSNormalization", x, weight, epsilon=eps)


def _feed_forward(g: GraphWriter, x: Value, w: BlockWeights, kind: FFNKind, name: str, bits: Bits) -> Value:
    up = linear(g, x, f"{name}.up", w["ffn_up.weight"], bits)
    if kind == "relu_squared":
        positive = g.op("Relu", up)
        inner = g.op("Mul", positive, positive)
    else:
        gate = linear(g, x, f"{name}.gate", w["ffn_gate.weight"], bits)
        inner = g.op("Mul", _activation(g, gate, kind), up)
    return linear(g, inner, f"{name}.down", w["ffn_down.weight"], bits)


def _activation(g: GraphWriter, x: Value, kind: FFNKind) -> Value:
    if kind == "geglu":
        return g.op("Gelu", x, approximate="tanh")
    return g.op("Mul", x, g.op("Sigmoid", x))  # onnxruntime fuses the two
