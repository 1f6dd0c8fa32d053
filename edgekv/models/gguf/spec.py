"""Specs of GGUF files: a ModelSpec read from the keys, and the tensors that it promises.

Key names: ggml-org/llama.cpp gguf-py/gguf/constants.py. A key of the architecture that EdgeKV does not know
is an error: what it says about the model would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.gguf.architectures import READERS, read_layers
from edgekv.models.gguf.keys import Keys
from edgekv.models.gguf.own import OWN_ARCH, own_spec
from edgekv.models.gguf.parts import require_whole
from edgekv.spec import MLA, MetaValue, ModelSpec
from edgekv.tensors import model_tensor_shapes

ARCHITECTURES = tuple(READERS)
# MLA whose keys' and values' up-projections are one matrix in the file: edgekv.models.gguf.canonical splits it.
JOINT_KV_B = ("minicpm3", "plm")
# LongRoPE divisors within the trained context, and beyond it, where EdgeKV does not go.
ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's divisors
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp aborts beyond it


def spec_from_gguf(
    metadata: Mapping[str, MetaValue], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> ModelSpec:
    """Read a ModelSpec and check that every tensor it implies is among `shapes` (name: numpy shape).

    Raises:
        ModelFileError: keys or tensors are missing, impossible, or contradict each other.
        UnsupportedError: the model is sound, but EdgeKV would not compute it as it is meant.
    """
    arch = whole_model_architecture(metadata, path)
    if arch == OWN_ARCH:
        spec = own_spec(metadata, path)
        _require_tensors(spec, shapes, Keys(metadata, path, arch))
        return spec
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: architecture {arch!r} is not supported; EdgeKV reads {', '.join(ARCHITECTURES)} ('llama' "
            "is Llama, SmolLM and Mistral)"
        )
    keys = Keys(metadata, path, arch)
    n_layers = keys.integer("block_count")
    if n_layers > MAX_LAYERS:
        keys.malformed(f"block_count is {n_layers}, at most {MAX_LAYERS} are possible")
    dim = keys.integer("embedding_length")
    spec = ModelSpec(
        arch=arch,
        name=str(metadata.get("general.name", path.stem)),
        layers=read_layers(keys, shapes, n_layers),
        dim=dim,
        vocab=shapes.get("token_embd.weight", (0,))[0],
        context_length=_trained_context(keys, shapes),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in shapes,
        **_scales(keys, dim, n_layers),
    )
    keys.reject_unknown(_implied(spec))
    _require_tensors(spec, shapes, keys)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != spec.vocab:
        keys.malformed(f"the vocabulary has {len(tokens)} tokens, token_embd.weight has {spec.vocab} rows")
    return spec


def whole_model_architecture(metadata: Mapping[str, MetaValue], path: Path) -> str:
    """The architecture of a file that holds all of a model, whether EdgeKV reads it or only llama.cpp.

    Raises:
        ModelFileError: the file names none.
        UnsupportedError: it is one part of a model.
    """
    require_whole(metadata, path)
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelFileError(f"{path}: key general.architecture is missing; {Keys.file_remedy}")
    return arch


def _trained_context(keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Tokens within which one set of frequencies holds: LongRoPE has a second one beyond (ROPE_FACTORS)."""
    context = keys.integer("context_length")
    if ROPE_FACTORS[0] not in shapes:
        return context
    return min(context, keys.integer("rope.scaling.original_context_length", context))


def _scales(keys: Keys, dim: int, n_layers: int) -> dict[str, float]:
    """Scales and caps of the whole model."""
    if keys.arch == "minicpm3":
        return minicpm3_scales(dim, n_layers)
    if keys.arch == "gemma2":
        cap = keys.number("final_logit_softcapping", 30.0)
        return {"embedding_scale": sqrt(dim), "logit_softcap": cap}
    if keys.arch == "gemma3":
        cap = keys.number("final_logit_softcapping") if keys.optional("final_logit_softcapping") else 0.0
        return {"embedding_scale": sqrt(dim), "logit_softcap": cap}
    return {}


def _implied(spec: ModelSpec) -> dict[str, tuple[float, ...]]:
    """Values of keys that this architecture does not need, by name, which say what it does without them.

    0 is llama.cpp's "not set", below 0 of the YaRN factor.
    """
    scales = {layer.attention.score_scale for layer in spec.layers}
    rope = spec.layers[0].attention.rope
    return {
        "attention.scale": (0.0, *(scales if len(scales) == 1 else ())),
        "logit_scale": (0.0, spec.logit_scale),
        "embedding_scale": (0.0, spec.embedding_scale),
        "residual_scale": (0.0, spec.residual_scale),
        "embedding_length_out": (spec.dim,),
        "rope.scaling.yarn_ext_factor": (
            -1.0,
            *((1.0,) if rope.yarn else (0.0,) if rope.factors else (0.0, 1.0)),
        ),
    }


def minicpm3_scales(dim: int, n_layers: int) -> dict[str, float]:
    """MiniCPM3-4B's scale_emb, scale_depth and dim_model_base as a ModelSpec has them.

    They are in no GGUF key: llama.cpp has the same constants in src/models/minicpm3.cpp.
    """
    return {"embedding_scale": 12.0, "residual_scale": 1.4 / sqrt(n_layers), "logit_scale": 256 / dim}


def with_rope_factors(spec: ModelSpec, factors: list[float]) -> ModelSpec:
    """The spec with LongRoPE's or Llama 3's factors in every layer, which a GGUF keeps in a tensor."""
    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, rope=replace(layer.attention.rope, factors=tuple(factors))),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def _file_tensor_shapes(spec: ModelSpec, present: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Shapes as a GGUF of the architecture has them: some keep as one tensor what is canonically several."""
    wanted = model_tensor_shapes(spec)
    for i, layer in enumerate(spec.layers):
        prefix, attention = f"blk.{i}.", layer.attention
        if isinstance(attention, MLA) and spec.arch in JOINT_KV_B:
            (h, r, n), (_, v, _) = (wanted.pop(f"{prefix}attn_{kind}_b.weight") for kind in "kv")
            wanted[f"{prefix}attn_kv_b.weight"] = (h * (n + v), r)
        if spec.arch == "phi3":
            wanted[f"{prefix}ffn_up.weight"] = (2 * layer.ffn_dim, spec.dim)
            del wanted[f"{prefix}ffn_gate.weight"]
        if f"{prefix}attn_qkv.weight" in present and spec.arch == "phi3":
            rows = sum(wanted.pop(f"{prefix}attn_{kind}.weight")[0] for kind in "qkv")
            wanted[f"{prefix}attn_qkv.weight"] = (rows, spec.dim)
    half = (spec.layers[0].attention.rope.dim // 2,)
    if spec.arch in ("minicpm3", "phi3") and any(name in present for name in ROPE_FACTORS):
        wanted |= dict.fromkeys(ROPE_FACTORS, half)
    if spec.arch == "llama" and ROPE_FREQS in present:
        wanted[ROPE_FREQS] = half
    return wanted


def _require_tensors(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], keys: Keys) -> None:
    """Every tensor the spec promises is there, with the shape it implies, and no other."""
    wanted = _file_tensor_shapes(spec, shapes)
    for name, shape in wanted.items():
        if name not in shapes:
            keys.malformed(f"tensor {name} is missing")
        if shapes[name] != shape:
            keys.malformed(f"tensor {name} has shape {shapes[name]}, the header implies {shape}")
    if extra := [name for name in shapes if name not in wanted]:
        raise UnsupportedError(
            f"{keys.path}: tensor {extra[0]} has no place in a plain {spec.arch!r} model, EdgeKV would drop it; "
            "choose a model without it"
        )
