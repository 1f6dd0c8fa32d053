"""EdgeKV's own GGUF architecture: models that llama.cpp has no graph for, with their spec as JSON in one key.

Such a file is an intermediate one: the NumPy reference runs it, `edgekv export onnx` makes a graph of it, and
llama.cpp refuses an architecture of this name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from edgekv.documents import Document, SchemaError, decode, dumps, parse
from edgekv.errors import ModelFileError
from edgekv.spec import GQA, MLA, AttentionSpec, Experts, FFNKind, LayerSpec, MetaValue, ModelSpec, RopeSpec

OWN_ARCH = "edgekv"
SPEC_KEY = "edgekv.spec"
SUFFIX = ".edgekv"  # of such files
_MAX_COUNT = 2**31


class OwnLayer(Document, frozen=True):
    """A layer; its attention is one of two."""

    ffn_dim: int
    ffn: FFNKind
    post_norms: bool
    gqa: GQA | None = None
    mla: MLA | None = None
    experts: Experts | None = None


class OwnSpec(Document, frozen=True):
    """A edgekv.spec.ModelSpec but for its name and architecture."""

    layers: tuple[OwnLayer, ...]
    dim: int
    vocab: int
    context_length: int
    norm_eps: float
    tied_embeddings: bool
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float


def own_keys(spec: ModelSpec) -> dict[str, MetaValue]:
    """GGUF keys of a spec, without the architecture that comes first in each; inverse of `own_spec`."""
    layers = tuple(
        OwnLayer(
            layer.ffn_dim,
            layer.ffn,
            layer.post_norms,
            layer.attention if isinstance(layer.attention, GQA) else None,
            layer.attention if isinstance(layer.attention, MLA) else None,
            layer.experts,
        )
        for layer in spec.layers
    )
    scales = (spec.embedding_scale, spec.residual_scale, spec.logit_scale, spec.logit_softcap)
    document = OwnSpec(
        layers, spec.dim, spec.vocab, spec.context_length, spec.norm_eps, spec.tied_embeddings, *scales
    )
    return {
        SPEC_KEY.removeprefix("edgekv."): dumps(document),
        "context_length": spec.context_length,
        "block_count": spec.n_layers,
    }


def own_spec(metadata: Mapping[str, MetaValue], path: Path) -> ModelSpec:
    """The spec in a file of EdgeKV's own architecture. Shapes of tensors are compared with it elsewhere.

    Raises:
        ModelFileError: it is missing, malformed, or holds an impossible number.
    """
    text = metadata.get(SPEC_KEY)
    try:
        if not isinstance(text, str):
            raise SchemaError(SPEC_KEY, "missing")
        found = decode(OwnSpec, parse(text))
        layers = tuple(_layer(layer) for layer in found.layers)
        _require_counts(found.dim, found.vocab, found.context_length, len(layers))
        _require_numbers(found.norm_eps, found.embedding_scale, found.residual_scale, found.logit_scale)
        if found.logit_softcap < 0:
            raise SchemaError("logit_softcap", "is below 0")
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: its {SPEC_KEY} is damaged ({error}); convert the model again"
        ) from None
    return ModelSpec(
        arch=OWN_ARCH,
        name=str(metadata.get("general.name", path.stem)),
        layers=layers,
        dim=found.dim,
        vocab=found.vocab,
        context_length=found.context_length,
        norm_eps=found.norm_eps,
        tied_embeddings=found.tied_embeddings,
        embedding_scale=found.embedding_scale,
        residual_scale=found.residual_scale,
        logit_scale=found.logit_scale,
        logit_softcap=found.logit_softcap,
    )


def _layer(found: OwnLayer) -> LayerSpec:
    attention: AttentionSpec | None = found.gqa or found.mla
    if attention is None or (found.gqa and found.mla):
        raise SchemaError("layers", "each has one attention, gqa or mla")
    _require_counts(found.ffn_dim, attention.n_heads, attention.head_dim)
    if min(attention.scale, attention.softcap, attention.window) < 0:
        raise SchemaError("layers", "a scale, cap or window is below 0")
    _check_rope(attention.rope)
    kv = attention if isinstance(attention, GQA) else attention.encoder
    if kv is not None:
        _require_counts(kv.n_kv_heads, kv.head_dim)
        if attention.n_heads % kv.n_kv_heads or attention.head_dim % 2:
            raise SchemaError("layers", "heads do not divide into groups, or a head into pairs")
    if isinstance(attention, MLA):
        _require_counts(attention.kv_lora_rank, attention.nope_dim, attention.value_dim)
    return LayerSpec(attention, found.ffn_dim, found.ffn, found.post_norms, found.experts)


def _check_rope(rope: RopeSpec) -> None:
    if rope.dim % 2 or not 0 <= rope.dim < _MAX_COUNT:
        raise SchemaError("layers", f"RoPE on {rope.dim} dims")
    if rope.factors and len(rope.factors) != rope.dim // 2:
        raise SchemaError("layers", f"{len(rope.factors)} RoPE factors for {rope.dim} dims")
    _require_numbers(rope.theta, rope.magnitude, *rope.factors)


def _require_counts(*values: int) -> None:
    for value in values:
        if not 1 <= value < _MAX_COUNT:
            raise SchemaError("", f"{value} is not a possible size")


def _require_numbers(*values: float) -> None:
    for value in values:
        if not (value > 0 and isfinite(value)):
            raise SchemaError("", f"{value} is not a positive number")
