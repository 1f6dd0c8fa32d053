"""A GGUF file as a TensorSource: validated, mapped, dequantized tensor by tensor with gguf-py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.gguf_check import check_gguf
from edgekv.source import Array, Metadata, MetaValue
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec


class GGUFSource:
    """A mapped GGUF file of arch `llama` or dense `deepseek2`.

    Raises:
        ModelFileError: the file is malformed, or tensors or keys are missing or contradict each other.
        UnsupportedError: the architecture is not handled.
    """

    def __init__(self, path: Path) -> None:
        check_gguf(path)
        self.path = path
        reader = gguf.GGUFReader(path)
        self._metadata: dict[str, MetaValue] = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._spec = spec_from_gguf(self._metadata, {n: self.shape(n) for n in self._tensors}, path)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._entry(name).shape))

    def quantization(self, name: str) -> str:
        return str(self._entry(name).tensor_type.name)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return int(self._entry(name).n_bytes)

    def load(self, name: str) -> Array:
        tensor = self._entry(name)
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(array, dtype=np.float32).reshape(self.shape(name))

    def raw(self, name: str) -> NDArray[np.uint8] | None:
        data = np.asarray(self._entry(name).data)
        return data.view(np.uint8)

    def _entry(self, name: str) -> Any:
        if name not in self._tensors:
            raise ModelFileError(f"{self.path}: tensor {name} is missing")
        return self._tensors[name]


def spec_from_gguf(
    metadata: dict[str, MetaValue], shapes: dict[str, tuple[int, ...]], path: Path
) -> ModelSpec:
    """Read a ModelSpec from GGUF keys (names: ggml-org/llama.cpp gguf-py/gguf/constants.py)."""
    keys = _Keys(metadata, path)
    arch = keys.text("general.architecture")
    if arch not in ("llama", "deepseek2"):
        raise UnsupportedError(
            f"{path}: architecture {arch!r} is not supported; EdgeKV reads 'llama' (Llama, SmolLM, Mistral) "
            "and dense 'deepseek2'"
        )
    n_layers = keys.integer(f"{arch}.block_count")
    attention = _gqa(keys) if arch == "llama" else _mla(keys)
    spec = ModelSpec(
        arch=arch,
        name=str(metadata.get("general.name", path.stem)),
        layers=(LayerSpec(attention, keys.integer(f"{arch}.feed_forward_length")),) * n_layers,
        dim=keys.integer(f"{arch}.embedding_length"),
        vocab=shapes.get("token_embd.weight", (0,))[0],
        context_length=keys.integer(f"{arch}.context_length"),
        norm_eps=keys.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in shapes,
    )
    _require_tensors(spec, shapes, path)
    return spec


def _gqa(keys: _Keys) -> GQA:
    n_heads = keys.integer("llama.attention.head_count")
    head_dim = keys.integer("llama.attention.key_length", keys.integer("llama.embedding_length") // n_heads)
    rope_dim = keys.integer("llama.rope.dimension_count", head_dim)
    if keys.integer("llama.expert_count", 0):
        raise UnsupportedError(f"{keys.path}: mixture-of-experts models are not supported yet")
    return GQA(
        n_heads=n_heads,
        n_kv_heads=keys.integer("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        rope=RopeSpec(keys.number("llama.rope.freq_base", 10000.0), rope_dim),
    )


def _mla(keys: _Keys) -> MLA:
    if keys.integer("deepseek2.leading_dense_block_count", 0) < keys.integer("deepseek2.block_count"):
        raise UnsupportedError(f"{keys.path}: deepseek2 with mixture-of-experts layers is not supported yet")
    rope_dim = keys.integer("deepseek2.rope.dimension_count")
    return MLA(
        n_heads=keys.integer("deepseek2.attention.head_count"),
        kv_lora_rank=keys.integer("deepseek2.attention.kv_lora_rank"),
        nope_dim=keys.integer("deepseek2.attention.key_length_mla") - rope_dim,
        value_dim=keys.integer("deepseek2.attention.value_length_mla"),
        rope=RopeSpec(keys.number("deepseek2.rope.freq_base", 10000.0), rope_dim),
        q_lora_rank=keys.integer("deepseek2.attention.q_lora_rank", 0),
    )


def layer_tensor_shapes(attention: GQA | MLA, dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors, keyed by the name after `blk.<i>.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
        "ffn_gate.weight": (ffn_dim, dim),
        "ffn_up.weight": (ffn_dim, dim),
        "ffn_down.weight": (dim, ffn_dim),
    }
    h = attention.n_heads
    if isinstance(attention, GQA):
        kv = attention.n_kv_heads * attention.head_dim
        return shapes | {
            "attn_q.weight": (h * attention.head_dim, dim),
            "attn_k.weight": (kv, dim),
            "attn_v.weight": (kv, dim),
            "attn_output.weight": (dim, h * attention.head_dim),
        }
    r = attention.kv_lora_rank
    return shapes | {
        "attn_q.weight": (h * attention.head_dim, dim),
        "attn_kv_a_mqa.weight": (attention.cache_values, dim),
        "attn_kv_a_norm.weight": (r,),
        "attn_k_b.weight": (h, r, attention.nope_dim),
        "attn_v_b.weight": (h, attention.value_dim, r),
        "attn_output.weight": (dim, h * attention.value_dim),
    }


def _require_tensors(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Every tensor the spec promises is there, with the shape it implies."""
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, spec.dim),
        "output_norm.weight": (spec.dim,),
    }
    if not spec.tied_embeddings:
        wanted["output.weight"] = (spec.vocab, spec.dim)
    for i, layer in enumerate(spec.layers):
        block = layer_tensor_shapes(layer.attention, spec.dim, layer.ffn_dim)
        wanted |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelFileError(f"{path}: tensor {name} is missing; download or export the file again")
        if shapes[name] != shape:
            raise ModelFileError(
                f"{path}: tensor {name} has shape {shapes[name]}, the header implies {shape}"
            )
    if extra := [name for name in shapes if name not in wanted]:
        raise UnsupportedError(
            f"{path}: tensor {extra[0]} has no place in a plain {spec.arch!r} model; EdgeKV would drop it"
        )


class _Keys:
    """Typed access to GGUF keys; a missing or mistyped one is an error that names it."""

    def __init__(self, metadata: dict[str, MetaValue], path: Path) -> None:
        self._metadata = metadata
        self.path = path

    def _get(self, key: str, default: MetaValue | None) -> MetaValue:
        value = self._metadata.get(key, default)
        if value is None:
            raise ModelFileError(f"{self.path}: key {key} is missing")
        return value

    def text(self, key: str) -> str:
        value = self._get(key, None)
        if not isinstance(value, str):
            raise ModelFileError(f"{self.path}: key {key} is {value!r}, a string was expected")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise ModelFileError(f"{self.path}: key {key} is {value!r}, a whole number was expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelFileError(f"{self.path}: key {key} is {value!r}, a positive number was expected")
        return float(value)
