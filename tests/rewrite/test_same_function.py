"""Every rewrite: the NumPy reference computes the same logits before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from edgekv.export.gguf.file_layout import file_layout
from edgekv.heal.weights import student_tensors
from edgekv.models.gguf.canonical import canonical
from edgekv.reference.model import ReferenceModel, load_block
from edgekv.rewrite.balance import balanced
from edgekv.rewrite.cache_basis import in_cache_basis
from edgekv.rewrite.int8_rows import RowBalance
from edgekv.rewrite.minicpm3 import folded
from edgekv.rewrite.norm_eps import with_norm_eps
from edgekv.rewrite.norm_trick import fold_norm
from edgekv.rewrite.rope_pairs import with_interleaved_pairs
from edgekv.rewrite.value_scales import with_balanced_values
from edgekv.source import Array, LazySource, TensorSource, with_tensors
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import model_tensor_shapes

DIM, FFN_DIM, N_LAYERS, HEADS, RANK = 48, 40, 3, 3, 32
HALVES, NEIGHBOURS = RopeSpec(10000.0, 16, "half"), RopeSpec(10000.0, 16)
LATENT = MLA(HEADS, RANK, nope_dim=12, value_dim=20, rope=NEIGHBOURS)
LOW_RANK_QUERIES = replace(LATENT, q_lora_rank=24)
MINICPM3 = replace(LOW_RANK_QUERIES, rope=replace(HALVES, factors=(3.0,) * 8, magnitude=1.2))
SCALES = {"embedding_scale": 12.0, "residual_scale": 0.8, "logit_scale": 0.3}
FAR_LARGER = 1e6  # than the mean square of any latent here: norms of folded latents are then linear to 1e-9
LATENT_NAMES = {"q": "attn_q", "k_b": "attn_k_b", "v_b": "attn_v_b", "output": "attn_output"}

Rewrite = Callable[[TensorSource], TensorSource]


def folded_to_latent(source: TensorSource) -> TensorSource:
    """A model with one KV head as MLA: its values are the latent, behind the norm trick, and its key the rope key."""
    layers = []
    computed: dict[str, Array] = {}
    for i, layer in enumerate(source.spec.layers):
        a = layer.attention
        assert isinstance(a, GQA)
        assert a.n_kv_heads == 1
        mla = MLA(a.n_heads, a.head_dim, nope_dim=2, value_dim=a.head_dim, rope=a.rope, scale=a.score_scale)
        w = load_block(source, i)
        rows, norm = fold_norm(w["attn_v.weight"], FAR_LARGER, source.spec.norm_eps)
        queries = w["attn_q.weight"].reshape(a.n_heads, a.head_dim, -1)
        block = {
            "attn_q": np.pad(queries, ((0, 0), (2, 0), (0, 0))).reshape(-1, source.spec.dim),
            "attn_kv_a_mqa": np.concatenate([rows, w["attn_k.weight"]]),
            "attn_kv_a_norm": norm,
            "attn_k_b": np.zeros((a.n_heads, a.head_dim, 2), np.float32),
            "attn_v_b": np.tile(np.eye(a.head_dim, dtype=np.float32), (a.n_heads, 1, 1)),
        }
        computed |= {f"blk.{i}.{name}.weight": array for name, array in block.items()}
        layers.append(replace(layer, attention=mla))
    out = LazySource(replace(source.spec, layers=tuple(layers)), source.metadata)
    for name in model_tensor_shapes(out.spec):
        if name in computed:
            out.add_array(name, computed[name])
        else:
            out.borrow(source, name)
    return out


def with_balanced_scales(source: TensorSource) -> TensorSource:
    tensors = balanced(student_tensors(source), LATENT)
    return with_student(
        source, [{name: array[i] for name, array in tensors.items()} for i in range(N_LAYERS)]
    )


def with_cache_basis(source: TensorSource) -> TensorSource:
    tensors = student_tensors(source)
    inputs = np.random.default_rng(1).standard_normal((400, DIM)).astype(np.float32)
    layers = [{name: array[i] for name, array in tensors.items()} for i in range(N_LAYERS)]
    return with_student(source, [in_cache_basis(layer, inputs, LATENT) for layer in layers])


def with_student(source: TensorSource, layers: list[Mapping[str, Array]]) -> TensorSource:
    """The source with attentions whose latent has no norm, as healing has them, behind the norm trick."""
    computed: dict[str, Array] = {}
    for i, layer in enumerate(layers):
        rows, norm = fold_norm(layer["kv_a"][:RANK], FAR_LARGER, source.spec.norm_eps)
        computed[f"blk.{i}.attn_kv_a_mqa.weight"] = np.concatenate([rows, layer["kv_a"][RANK:]])
        computed[f"blk.{i}.attn_kv_a_norm.weight"] = norm
        computed |= {
            f"blk.{i}.{ours}.weight": layer[name] for name, ours in LATENT_NAMES.items() if name in layer
        }
    return with_tensors(source, {name: partial(np.copy, array) for name, array in computed.items()})


def with_int8_rows(source: TensorSource) -> TensorSource:
    balance, computed = RowBalance(source), {}
    for i in range(N_LAYERS):
        block = load_block(source, i)
        balance.apply(block, i)
        computed |= {f"blk.{i}.{name}": partial(np.copy, array) for name, array in block.items()}
    return with_tensors(source, computed)


def through_gguf_layout(source: TensorSource) -> TensorSource:
    """Keys' and values' up-projections joined, as llama.cpp's architecture wants them, and split again."""
    laid_out = file_layout(source)
    assert "blk.0.attn_kv_b.weight" in laid_out.names()
    return canonical(laid_out)


CASES: dict[str, tuple[Rewrite, GQA | MLA, dict[str, object]]] = {
    # name: (rewrite, attention of the model, what else sets its spec apart)
    "norm_trick": (folded_to_latent, GQA(HEADS, 1, 16, NEIGHBOURS), {}),
    "norm_eps": (partial(with_norm_eps, eps=1e-6), LATENT, {"linear": True}),
    "norm_eps, untied": (partial(with_norm_eps, eps=3e-5), LATENT, {"tied_embeddings": False}),
    "norm_eps, low-rank queries": (partial(with_norm_eps, eps=1e-6), LOW_RANK_QUERIES, {}),
    "value_scales": (with_balanced_values, LATENT, {}),
    "balance": (with_balanced_scales, LATENT, {"linear": True}),
    "cache_basis": (with_cache_basis, LATENT, {"linear": True}),
    "rope_pairs": (with_interleaved_pairs, GQA(HEADS, 1, 16, HALVES, bias=True), {}),
    "kv_b, plm": (through_gguf_layout, LATENT, {"arch": "plm", "ffn": "relu_squared"}),
    "kv_b, minicpm3": (
        through_gguf_layout,
        replace(MINICPM3, rope=replace(HALVES, factors=(1.0, *(3.0,) * 7))),
        {"arch": "minicpm3", **SCALES},
    ),
    "minicpm3": (folded, MINICPM3, {"arch": "minicpm3", **SCALES}),
    "minicpm3, untied": (folded, MINICPM3, {"arch": "minicpm3", "tied_embeddings": False, **SCALES}),
    "int8_rows": (with_int8_rows, LATENT, {}),
    "int8_rows, half": (with_int8_rows, replace(LOW_RANK_QUERIES, rope=HALVES), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_equal_before_and_after(name: str, make_llama: Callable[..., LazySource]) -> None:
    rewrite, attention, traits = CASES[name]
    before = random_model(attention, make_llama().metadata, **traits)
    after = rewrite(before)
    assert any(
        name not in before.names() or not np.array_equal(after.load(name), before.load(name))
        for name in after.names()
    ) or name.startswith("kv_b"), "something was rewritten"
    expected, found = logits(before), logits(after)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def random_model(
    attention: GQA | MLA,
    metadata: Mapping[str, object],
    arch: str = "llama",
    ffn: str = "swiglu",
    tied_embeddings: bool = True,
    linear: bool = False,
    **scales: float,
) -> TensorSource:
    """A model with random weights, norms among them; `linear` has latents without a norm, behind the norm trick."""
    layers = (LayerSpec(attention, FFN_DIM, ffn),) * N_LAYERS
    vocab = len(metadata["tokenizer.ggml.tokens"])
    spec = ModelSpec(arch, "random", layers, DIM, vocab, 256, 1e-5, tied_embeddings, **scales)
    source = LazySource(spec, metadata)
    rng = np.random.default_rng(0)
    for name, shape in model_tensor_shapes(spec).items():
        noise = 0.1 * rng.standard_normal(shape)
        if len(shape) == 3:  # heads' up-projections, whose channels differ in size
            noise *= np.exp(rng.standard_normal((*shape[:2], 1)))
        source.add_array(name, (noise + ("norm" in name)).astype(np.float32))
    if not linear:
        return source
    return with_student(
        source, [{"kv_a": source.load(f"blk.{i}.attn_kv_a_mqa.weight")} for i in range(N_LAYERS)]
    )


def logits(source: TensorSource) -> np.ndarray:
    model = ReferenceModel(source)
    tokens = np.random.default_rng(2).integers(0, source.spec.vocab, 24).tolist()
    return model.logits(model.hidden(tokens, model.new_cache(len(tokens))))
