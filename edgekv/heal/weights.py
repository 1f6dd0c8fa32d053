"""File of healed weights, and an original model with them put in.

The file is a safetensors: each tensor is stored as the bytes of a GGML type (Q6_K, Q8_0, BF16 or F32) stacked over
layers, and one metadata entry, "edgekv.heal", holds a HealedRecord and each tensor's type and shape as JSON.
Latent encoders are stored without the norm trick's scale. They undo the covariance of their input, so their columns
differ widely; from format 2 on, a quantized one has a scale per column in a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgekv.convert.layers import converted_source
from edgekv.documents import decode, dumps, parse
from edgekv.errors import InputError, UnsupportedError
from edgekv.files import atomic_path, file_sha256
from edgekv.heal.recipe import HealedRecord, drop_retired
from edgekv.models.gguf.source import GGUFSource
from edgekv.quant import q6_k
from edgekv.rewrite.cache_basis import ATTENTION
from edgekv.rewrite.norm_trick import fold_norm, unfold_norm
from edgekv.source import Array, TensorSource, with_tensors
from edgekv.spec import MLA, ModelSpec

FORMAT = 2
READABLE = (1, 2)
RECORD_KEY = "edgekv.heal"
Storage = Literal["q6_k", "q8_0", "bf16"]
Tensors = Mapping[str, Array]

# Stacked tensors that are a block's own: the name of the block's tensor in GGUF.
BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k_b": "attn_k_b.weight",
    "v_b": "attn_v_b.weight",
    "output": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
}
MEAN_SQUARE = "latent_mean_square"  # (layers,): what the norm trick scales by
ENCODER, COLUMN_SCALE = "kv_a", "kv_a_column_scale"  # the scale: (layers, D)


def student_tensors(converted: TensorSource) -> dict[str, Array]:
    """Attention of a converted model as training wants it: stacked over layers, the latent's norm undone.

    q (L, H*(N+P), D), kv_a (L, R+P, D), k_b (L, H, R, N), v_b (L, H, V, R), output (L, D, H*V).
    """
    spec = converted.spec
    kv_a = []
    for i, layer in enumerate(spec.layers):
        attention = layer.attention
        assert isinstance(attention, MLA)
        rows = converted.load(f"blk.{i}.attn_kv_a_mqa.weight")
        norm = converted.load(f"blk.{i}.attn_kv_a_norm.weight")
        rank = attention.kv_lora_rank
        kv_a.append(np.concatenate([unfold_norm(rows[:rank], norm, spec.norm_eps), rows[rank:]]))
    tensors = {
        name: np.stack([converted.load(f"blk.{i}.{BLOCK_NAMES[name]}") for i in range(spec.n_layers)])
        for name in ("q", "k_b", "v_b", "output")
    }
    return tensors | {"kv_a": np.stack(kv_a)}


def healed_source(source: TensorSource, attention: MLA, tensors: Tensors) -> TensorSource:
    """The original with healed tensors in place of its own; what was not trained is borrowed.

    `tensors` has the names of `student_tensors`, MEAN_SQUARE, and "attn_norm", "ffn_norm", "output_norm" where those
    were trained.
    """
    replaced = _gguf_tensors(tensors, attention.kv_lora_rank, source.spec)
    converted = converted_source(source, attention, replaced.__getitem__)
    return with_tensors(converted, {name: partial(replaced.__getitem__, name) for name in replaced})


def _gguf_tensors(tensors: Tensors, rank: int, spec: ModelSpec) -> dict[str, Array]:
    """Stacked tensors as one model's, by canonical name; the latent folded for its norm."""
    named: dict[str, Array] = {}
    if "output_norm" in tensors:
        named["output_norm.weight"] = tensors["output_norm"][0]
    for i in range(spec.n_layers):
        kv_a = tensors["kv_a"][i]
        latent, norm = fold_norm(kv_a[:rank], float(tensors[MEAN_SQUARE][i]), spec.norm_eps)
        named[f"blk.{i}.attn_kv_a_mqa.weight"] = np.concatenate([latent, kv_a[rank:]])
        named[f"blk.{i}.attn_kv_a_norm.weight"] = norm
        named |= {f"blk.{i}.{own}": tensors[name][i] for name, own in BLOCK_NAMES.items() if name in tensors}
    return named


def write_healed(path: Path, tensors: Tensors, record: HealedRecord, storage: Storage, force: bool) -> None:
    """Write healed tensors, quantized, and their record.

    Raises:
        OutputError: the folder is missing, the file exists and `force` is not set, or the disk is full.
    """
    stored = {}
    layout = {}
    for name, kind, shape, data in _packed(tensors, storage):
        stored[name] = data
        layout[name] = {"type": kind.name, "shape": list(shape)}
    document = dumps({"record": replace(record, format=FORMAT), "tensors": layout})
    with atomic_path(path, force) as partial:
        save_file(stored, partial, {RECORD_KEY: document})


def as_stored(tensors: Tensors, storage: Storage) -> dict[str, Array]:
    """The tensors with the rounding that `write_healed` gives them."""
    return _unscaled(
        {name: _restore(data, kind, shape) for name, kind, shape, data in _packed(tensors, storage)}
    )


def _packed(
    tensors: Tensors, storage: Storage
) -> Iterator[tuple[str, QuantType, tuple[int, ...], NDArray[np.uint8]]]:
    """Name, type, shape and bytes of each tensor of a file."""
    for name, array in _scaled(tensors, storage).items():
        kind = _storage_type(name, array, storage)
        blocks = q6_k.quantize_q6_k(array) if kind is QuantType.Q6_K else gguf.quants.quantize(array, kind)
        yield name, kind, array.shape, np.frombuffer(blocks.tobytes(), np.uint8)


def _scaled(tensors: Tensors, storage: Storage) -> dict[str, Array]:
    """The tensors, the columns of a latent encoder that will be quantized brought to one size."""
    if storage == "bf16":
        return dict(tensors)
    encoder = tensors[ENCODER]
    scale = np.sqrt(np.mean(encoder**2, axis=1))
    scale[scale == 0] = 1
    return {**tensors, ENCODER: encoder / scale[:, None], COLUMN_SCALE: scale}


def _unscaled(tensors: Tensors) -> dict[str, Array]:
    """Inverse of `_scaled`."""
    restored = dict(tensors)
    scale = restored.pop(COLUMN_SCALE, None)
    if scale is not None:
        restored[ENCODER] = restored[ENCODER] * scale[:, None]
    return restored


def _storage_type(name: str, array: Array, storage: Storage) -> QuantType:
    """Latent encoders, small and delicate, keep 8 bits at least."""
    if array.ndim < 3:  # norms and scales: a few kilobytes
        return QuantType.F32
    if storage == "q6_k" and name != ENCODER and array.size % q6_k.BLOCK == 0:
        return QuantType.Q6_K
    if storage != "bf16" and array.shape[-1] % 32 == 0:
        return QuantType.Q8_0
    return QuantType.BF16


# What the readers of JSON, of safetensors and of gguf-py's blocks raise.
_DAMAGE = (
    *(SafetensorError, LookupError, TypeError, ValueError, AttributeError),
    *(NotImplementedError, AssertionError, RecursionError),
)


def read_healed(path: Path) -> tuple[HealedRecord, dict[str, Array]]:
    """A file's record and its tensors in float32.

    Raises:
        InputError: it is no file of healed weights, is damaged, or was written by a newer EdgeKV.
    """
    try:
        with safe_open(path, framework="np") as file:
            document = parse((file.metadata() or {})[RECORD_KEY])
            if (found := document["record"]["format"]) not in READABLE:
                raise InputError(f"{path} has format {found}, this EdgeKV reads {FORMAT}; upgrade EdgeKV")
            drop_retired(document["record"], path)
            record = decode(HealedRecord, document["record"])
            tensors = {
                name: _restore(
                    file.get_tensor(name), QuantType[entry["type"]], tuple(int(n) for n in entry["shape"])
                )
                for name, entry in document["tensors"].items()
            }
            tensors = _unscaled(tensors)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a file that `edgekv heal` wrote") from error
    except (*_DAMAGE, OSError) as error:
        raise InputError(
            f"{path} is not a file of healed weights ({error}); `edgekv heal` writes them"
        ) from error
    if not record.evaluations:
        raise InputError(f"{path} does not say how well it was healed; write it with `edgekv heal`")
    _check_shapes(path, record, tensors)
    return record, tensors


def _restore(data: NDArray[np.uint8], kind: QuantType, shape: tuple[int, ...]) -> Array:
    """A tensor from its bytes, in which blocks may cross rows."""
    return np.asarray(gguf.quants.dequantize(data, kind), np.float32).reshape(shape)


def student_shapes(attention: MLA, n_layers: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `student_tensors`."""
    h, r, n, v = attention.n_heads, attention.kv_lora_rank, attention.nope_dim, attention.value_dim
    return {
        "q": (n_layers, h * attention.head_dim, dim),
        "kv_a": (n_layers, attention.cache_values, dim),
        "k_b": (n_layers, h, r, n),
        "v_b": (n_layers, h, v, r),
        "output": (n_layers, dim, h * v),
    }


def _check_shapes(path: Path, record: HealedRecord, tensors: Tensors) -> None:
    for name in (*ATTENTION, MEAN_SQUARE):
        if name not in tensors:
            raise InputError(f"{path}: tensor {name} is missing; fetch the file again")
    if tensors["q"].ndim != 3:
        raise InputError(f"{path}: tensor q has {tensors['q'].ndim} axes, not 3; fetch the file again")
    n_layers, _, dim = tensors["q"].shape
    wanted = {**student_shapes(record.attention, n_layers, dim), MEAN_SQUARE: (n_layers,)}
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{path}: tensor {name} has shape {tensors[name].shape}, not {shape}; fetch the file again"
            )
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity; heal again with a lower --lr")


def base_sha256(source: TensorSource) -> str:
    """SHA-256 of the GGUF file that a source reads: it ties healed weights to their original.

    Raises:
        UnsupportedError: the source is not a GGUF file.
    """
    if not isinstance(source, GGUFSource):
        raise UnsupportedError(f"{source.spec.name} is not a GGUF file; healed weights belong to one")
    return file_sha256(source.path)


def load_healed(path: Path, source: TensorSource) -> TensorSource:
    """The original converted to MLA, with the healed tensors of `path`; ready for edgekv.export.gguf.write.

    Raises:
        InputError: the file is unsound, or its weights were healed for another original.
        UnsupportedError: the source is not a GGUF file.
    """
    record, tensors = read_healed(path)
    check_base(path, record, source)
    n_layers, _, dim = tensors["q"].shape
    if (n_layers, dim) != (source.spec.n_layers, source.spec.dim):
        raise InputError(
            f"{path} has {n_layers} layers of width {dim}, the model {source.spec.n_layers} of {source.spec.dim}; "
            "fetch the file again"
        )
    return healed_source(source, record.attention, tensors)


def check_base(path: Path, record: HealedRecord, source: TensorSource) -> None:
    """Raise InputError unless the weights of `path` were healed for this very file."""
    if (found := base_sha256(source)) != record.base_sha256:
        raise InputError(
            f"{path} was healed for {record.base_name} (SHA-256 {record.base_sha256[:16]}…), the model given "
            f"is another file ({found[:16]}…); healed weights fit only the file they came from"
        )
