"""From GGUF keys to a ModelSpec, and the tensors that a spec promises.

Key names: ggml-org/llama.cpp gguf-py/gguf/constants.py. A key of the architecture that EdgeKV does not know
is an error: what it says about the model would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.spec import GQA, MLA, AttentionSpec, FFNKind, LayerSpec, ModelSpec, RopeLayout, RopeSpec

if TYPE_CHECKING:  # a type only: edgekv.source costs the import of numpy
    from edgekv.source import MetaValue

ARCHITECTURES = ("llama", "deepseek2", "minicpm3", "plm")
# MLA whose keys' and values' up-projections are one matrix in the file: edgekv.gguf_source splits it.
JOINT_KV_B = ("minicpm3", "plm")
# LongRoPE divisors within the trained context, and beyond it, where EdgeKV does not go.
ROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp aborts beyond it
# Keys after `<arch>.` that change nothing in a model without experts and without rope scaling.
_IGNORED = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
    | {f"expert_{name}" for name in ("feed_forward_length", "shared_count", "weights_scale")}
    | {f"expert_{name}" for name in ("weights_norm", "gating_func", "used_count")}
)
# Keys that must have one of these values; any other makes a model that EdgeKV would compute wrongly.
_NEUTRAL: Mapping[str, tuple[MetaValue, ...]] = MappingProxyType(
    {
        "expert_count": (0,),
        "expert_group_count": (0,),
        "attention.causal": (True,),
        "rope.scaling.type": ("none", "linear"),
        "rope.scaling.factor": (0.0, 1.0),
        "rope.scale_linear": (0.0, 1.0),
        "rope.scaling.attn_factor": (1.0,),
    }
)


def spec_from_gguf(
    metadata: Mapping[str, MetaValue], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> ModelSpec:
    """Read a ModelSpec and check that every tensor it implies is among `shapes` (name: numpy shape).

    Raises:
        ModelFileError: keys or tensors are missing, impossible, or contradict each other.
        UnsupportedError: the model is sound, but EdgeKV would not compute it as it is meant.
    """
    arch = _architecture(metadata, path)
    keys = _Keys(metadata, path, arch)
    n_layers = keys.integer("block_count")
    if n_layers > MAX_LAYERS:
        keys.fail(f"block_count is {n_layers}, at most {MAX_LAYERS} are possible")
    readers: dict[str, Callable[[_Keys], AttentionSpec]] = {
        "llama": _gqa,
        "deepseek2": _mla,
        "minicpm3": _mla_minicpm3,
        "plm": _mla_plm,
    }
    ffn: FFNKind = "relu_squared" if arch == "plm" else "swiglu"
    dim = keys.integer("embedding_length")
    spec = ModelSpec(
        arch=arch,
        name=str(metadata.get("general.name", path.stem)),
        layers=(LayerSpec(readers[arch](keys), keys.integer("feed_forward_length"), ffn),) * n_layers,
        dim=dim,
        vocab=shapes.get("token_embd.weight", (0,))[0],
        context_length=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in shapes,
        **(_minicpm3_scales(dim, n_layers) if arch == "minicpm3" else {}),
    )
    keys.reject_unknown()
    _require_tensors(spec, shapes, path)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != spec.vocab:
        keys.fail(f"the vocabulary has {len(tokens)} tokens, token_embd.weight has {spec.vocab} rows")
    return spec


def _architecture(metadata: Mapping[str, MetaValue], path: Path) -> str:
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelFileError(
            f"{path}: key general.architecture is missing; download or export the file again"
        )
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: architecture {arch!r} is not supported; EdgeKV reads 'llama' (Llama, SmolLM, Mistral), "
            "dense 'deepseek2', 'minicpm3' and 'plm'"
        )
    splits = metadata.get("split.count", 1)
    if isinstance(splits, int) and splits > 1:
        raise UnsupportedError(
            f"{path}: is one of {splits} parts of a model; join them with `llama-gguf-split --merge`"
        )
    return arch


def _gqa(keys: _Keys) -> GQA:
    n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    n_kv_heads = keys.integer("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        keys.fail(f"{n_heads} query heads do not divide among {n_kv_heads} KV heads")
    if dim % n_heads and "llama.attention.key_length" not in keys.metadata:
        keys.fail(f"a width of {dim} does not divide among {n_heads} heads")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    value_dim = keys.integer("attention.value_length", dim // n_heads)
    if rope_dim % 2 or not head_dim == rope_dim == value_dim:  # as llama.cpp wants of arch llama
        keys.fail(
            f"key, value and rope dims of a head are {head_dim}, {value_dim}, {rope_dim}: not one even number"
        )
    return GQA(n_heads, n_kv_heads, head_dim, RopeSpec(keys.number("rope.freq_base", 10000.0), rope_dim))


def _mla(keys: _Keys) -> MLA:
    if keys.integer("leading_dense_block_count", 0, least=0) < keys.integer("block_count"):
        keys.unsupported("deepseek2 with mixture-of-experts layers")
    if keys.integer("attention.q_lora_rank", 0, least=0):
        keys.unsupported("deepseek2 with low-rank queries (attention.q_lora_rank)")
    rope_dim, rank = keys.integer("rope.dimension_count"), keys.integer("attention.kv_lora_rank")
    head_dim = keys.integer("attention.key_length_mla")
    if rope_dim % 2 or rope_dim >= head_dim:
        keys.fail(
            f"rope.dimension_count is {rope_dim}, an even number below the head's {head_dim} was expected"
        )
    for key, implied in (("head_count_kv", 1), ("key_length", rank + rope_dim), ("value_length", rank)):
        if (value := keys.integer(f"attention.{key}")) != implied:
            keys.fail(f"deepseek2.attention.{key} is {value}, the latent cache implies {implied}")
    return MLA(
        n_heads=keys.integer("attention.head_count"),
        kv_lora_rank=rank,
        nope_dim=head_dim - rope_dim,
        value_dim=keys.integer("attention.value_length_mla"),
        rope=RopeSpec(keys.number("rope.freq_base", 10000.0), rope_dim),
    )


def _mla_minicpm3(keys: _Keys) -> MLA:
    """MiniCPM3 (llama.cpp src/models/minicpm3.cpp): low-rank queries, LongRoPE factors, NEOX pairs."""
    context = keys.integer("context_length")
    if keys.integer("rope.scaling.original_context_length", context) < context:
        keys.unsupported("minicpm3 whose rope factors change within its context")
    return replace(_plain_mla(keys, "half"), q_lora_rank=keys.integer("attention.q_lora_rank"))


def _mla_plm(keys: _Keys) -> MLA:
    """PLM (llama.cpp src/models/plm.cpp)."""
    return _plain_mla(keys, "interleaved")


def _plain_mla(keys: _Keys, layout: RopeLayout) -> MLA:
    """MLA described by the dims of its decompressed keys and values, as both llama.cpp graphs have it."""
    n_heads, dim = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if keys.integer("attention.head_count_kv", n_heads) != n_heads:
        keys.fail("attention.head_count_kv differs from attention.head_count")
    head_dim, rope_dim = keys.integer("attention.key_length"), keys.integer("rope.dimension_count")
    if rope_dim % 2 or rope_dim >= head_dim:
        keys.fail(
            f"rope.dimension_count is {rope_dim}, an even number below the head's {head_dim} was expected"
        )
    return MLA(
        n_heads=n_heads,
        kv_lora_rank=keys.integer("attention.kv_lora_rank"),
        nope_dim=head_dim - rope_dim,
        value_dim=keys.integer("attention.value_length", dim // n_heads),
        rope=RopeSpec(keys.number("rope.freq_base", 10000.0), rope_dim, layout),
    )


def _minicpm3_scales(dim: int, n_layers: int) -> dict[str, float]:
    """scale_emb, scale_depth and dim_model_base of MiniCPM3-4B, which no GGUF key carries: llama.cpp has the
    same constants in src/models/minicpm3.cpp."""
    return {"embedding_scale": 12.0, "residual_scale": 1.4 / sqrt(n_layers), "logit_scale": 256 / dim}


def with_rope_factors(spec: ModelSpec, factors: list[float]) -> ModelSpec:
    """The spec with LongRoPE factors in every layer, which a GGUF keeps in a tensor."""
    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, rope=replace(layer.attention.rope, factors=tuple(factors))),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def layer_tensor_shapes(
    attention: GQA | MLA, dim: int, ffn_dim: int, ffn: FFNKind = "swiglu"
) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors, keyed by the name after `blk.<i>.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
        "ffn_up.weight": (ffn_dim, dim),
        "ffn_down.weight": (dim, ffn_dim),
    }
    if ffn == "swiglu":
        shapes["ffn_gate.weight"] = (ffn_dim, dim)
    h = attention.n_heads
    if isinstance(attention, GQA):
        kv = attention.n_kv_heads * attention.head_dim
        return shapes | {
            "attn_q.weight": (h * attention.head_dim, dim),
            "attn_k.weight": (kv, dim),
            "attn_v.weight": (kv, dim),
            "attn_output.weight": (dim, h * attention.head_dim),
        }
    r, q_rank = attention.kv_lora_rank, attention.q_lora_rank
    if q_rank:
        shapes |= {
            "attn_q_a.weight": (q_rank, dim),
            "attn_q_a_norm.weight": (q_rank,),
            "attn_q_b.weight": (h * attention.head_dim, q_rank),
        }
    else:
        shapes["attn_q.weight"] = (h * attention.head_dim, dim)
    return shapes | {
        "attn_kv_a_mqa.weight": (attention.cache_values, dim),
        "attn_kv_a_norm.weight": (r,),
        "attn_k_b.weight": (h, r, attention.nope_dim),
        "attn_v_b.weight": (h, attention.value_dim, r),
        "attn_output.weight": (dim, h * attention.value_dim),
    }


def _require_tensors(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Every tensor the spec promises is there, with the shape it implies."""
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, spec.dim),
        "output_norm.weight": (spec.dim,),
    }
    if not spec.tied_embeddings:
        wanted["output.weight"] = (spec.vocab, spec.dim)
    for i, layer in enumerate(spec.layers):
        block = layer_tensor_shapes(layer.attention, spec.dim, layer.ffn_dim, layer.ffn)
        if spec.arch in JOINT_KV_B:
            (h, r, n), (_, v, _) = (block.pop(f"attn_{kind}_b.weight") for kind in "kv")
            block["attn_kv_b.weight"] = (h * (n + v), r)
        wanted |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    half = (spec.layers[0].attention.rope.dim // 2,)
    if spec.arch == "minicpm3" and any(name in shapes for name in ROPE_FACTORS):
        wanted |= dict.fromkeys(ROPE_FACTORS, half)
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelFileError(f"{path}: tensor {name} is missing; download or export the file again")
        if shapes[name] != shape:
            raise ModelFileError(
                f"{path}: tensor {name} has shape {shapes[name]}, the header implies {shape}; "
                "download or export the file again"
            )
    if extra := [name for name in shapes if name not in wanted]:
        raise UnsupportedError(
            f"{path}: tensor {extra[0]} has no place in a plain {spec.arch!r} model, EdgeKV would drop it; "
            "choose a model without it"
        )


class _Keys:
    """Typed access to the keys of one architecture; a missing or mistyped one is an error that names it."""

    def __init__(self, metadata: Mapping[str, MetaValue], path: Path, arch: str) -> None:
        self.metadata = metadata
        self._path = path
        self._arch = arch
        self._read: set[str] = set()

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, list):
            self.unsupported(f"a different {self._arch}.{key} in each layer")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            self.fail(f"key {self._arch}.{key} is {value!r}, a whole number of at least {least} was expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (value > 0 and isfinite(value))
        ):
            self.fail(f"key {self._arch}.{key} is {value!r}, a positive number was expected")
        return float(value)

    def reject_unknown(self) -> None:
        """Every other key of the architecture is one that changes nothing here."""
        prefix = f"{self._arch}."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._read or name in _IGNORED:
                continue
            if value not in _NEUTRAL.get(name, ()):
                shown = value if isinstance(value, str | int | float) else "set"
                self.unsupported(f"a model whose {key} is {shown!r}")

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self._path}: {problem}; download or export the file again")

    def unsupported(self, what: str) -> NoReturn:
        raise UnsupportedError(f"{self._path}: {what} is not supported; choose a plain {self._arch!r} model")

    def _get(self, key: str, default: MetaValue | None) -> MetaValue:
        self._read.add(key)
        value = self.metadata.get(f"{self._arch}.{key}", default)
        if value is None:
            self.fail(f"key {self._arch}.{key} is missing")
        return value
