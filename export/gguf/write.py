"""GGUF files written from any TensorSource, tensor by tensor, and renamed into place when complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from edgekv import __version__
from edgekv.export.gguf.architectures import architecture_keys, gguf_arch
from edgekv.export.gguf.file_layout import file_layout
from edgekv.files import atomic_path
from edgekv.progress import Progress
from edgekv.quant.formats import BY_GGML_ID, FILE_TYPES, FORMATS, KEEP, PLAIN_WEIGHTS, UNQUANTIZED
from edgekv.source import TensorSource
from edgekv.spec import Metadata, MetaValue

WEIGHT_TYPES: Mapping[str, QuantType] = MappingProxyType(
    {name: QuantType(FORMATS[name].ggml_id) for name in PLAIN_WEIGHTS}
)


def tensor_type(name: str, shape: tuple[int, ...], weights: QuantType) -> QuantType:
    """The type a tensor is written in when the model's weights are `weights`.

    Vectors and the experts' router stay F32. `attn_kv_a_mqa` stays F32 for quantized weights and f16, because
    norm trick weights underflow f16 (edgekv.rewrite.norm_trick); BF16 has the exponent range. So do the maps between
    heads and encoded rows, which are small. Embeddings and the output
    head keep 8 bits, as llama.cpp's own presets do. A row that does not divide into blocks becomes F16.
    """
    if len(shape) == 1:
        return QuantType.F32
    if name.endswith("ffn_gate_inp.weight"):  # small, and the choice of experts depends on it
        return QuantType.F32
    if name.endswith(("attn_kv_a_mqa.weight", "attn_kv_enc.weight", "attn_q_map.weight")):
        return QuantType.BF16 if weights == QuantType.BF16 else QuantType.F32
    if name in ("token_embd.weight", "output.weight") and BY_GGML_ID[weights].bits < 8:
        weights = QuantType.Q8_0
    return QuantType.F16 if shape[-1] % BY_GGML_ID[weights].block else weights


def stored_weights(source: TensorSource) -> str:
    """The --weights choice nearest to the format of most of a source's values."""
    sizes: Counter[str] = Counter()
    for name in source.names():
        sizes[source.quantization(name).lower()] += prod(source.shape(name))
    most = sizes.most_common(1)[0][0]
    return most if most in UNQUANTIZED else KEEP


def write_gguf(
    source: TensorSource,
    path: Path,
    weights: str,
    notes: Metadata,
    force: bool,
    progress: Progress,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a source as GGUF; `notes` are extra key-value pairs on how it was made.

    Args:
        check: called with the whole file under a temporary name; what it raises leaves `path` as it was.

    Raises:
        OutputError: the folder is missing, the file exists and `force` is not set, or the disk is full.
    """
    source = file_layout(source)
    with atomic_path(path, force) as partial:
        writer, plan = begin_gguf(source, partial, weights, notes)
        for i, (name, quant) in enumerate(plan.items()):
            progress(i + 1, len(plan), name)
            writer.write_tensor_data(stored_as(source, name, quant))
        writer.close()
        if check is not None:
            check(partial)


def begin_gguf(
    source: TensorSource, path: Path, weights: str, notes: Metadata
) -> tuple[gguf.GGUFWriter, dict[str, QuantType]]:
    """Write everything but the data of a source in its file layout; the open writer and the type of each tensor."""
    plan = {name: _plan(source, name, weights) for name in source.names()}
    writer = gguf.GGUFWriter(path, gguf_arch(source.spec))
    _write_metadata(writer, source, weights, notes)
    for name, quant in plan.items():
        shape = source.shape(name)
        nbytes = tensor_nbytes(shape, quant)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, plan


def stored_as(source: TensorSource, name: str, quant: QuantType) -> NDArray[Any]:
    """A tensor's values as a file of that type holds them: the source's own bytes where it has them."""
    raw = source.raw(name) if source.quantization(name) == quant.name else None
    return raw if raw is not None else np.asarray(gguf.quants.quantize(source.load(name), quant))


def write_vocabulary(source: TensorSource, path: Path) -> None:
    """Write a source's name, licence, vocabulary and chat template as a GGUF without tensors.

    llama.cpp's repository keeps its vocabularies the same way (models/ggml-vocab-*.gguf).
    """
    writer = gguf.GGUFWriter(path, gguf_arch(source.spec))
    for key, value in _language_pairs(source).items():
        _add_key(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _plan(source: TensorSource, name: str, weights: str) -> QuantType:
    """The type to write a tensor in."""
    if weights == KEEP and source.raw(name) is not None:
        return QuantType[source.quantization(name)]
    chosen = WEIGHT_TYPES["q8_0" if weights == KEEP else weights]
    return tensor_type(name, source.shape(name), chosen)


def tensor_nbytes(shape: tuple[int, ...], quant: QuantType) -> int:
    """Bytes of a tensor's data, without padding."""
    return BY_GGML_ID[quant].nbytes(prod(shape))


def stored_nbytes(name: str, shape: tuple[int, ...], weights: str) -> int:
    """Bytes of a tensor's data in a model whose weights are `weights`."""
    return tensor_nbytes(shape, tensor_type(name, shape, WEIGHT_TYPES[weights]))


def _write_metadata(writer: gguf.GGUFWriter, source: TensorSource, weights: str, notes: Metadata) -> None:
    arch = gguf_arch(source.spec)
    stored = source.quantization(next(n for n in source.names() if n.startswith("blk.0.ffn_down")))
    quant = QuantType[stored] if weights == KEEP else WEIGHT_TYPES[weights]
    pairs = _language_pairs(source)
    pairs |= {f"{arch}.{key}": value for key, value in architecture_keys(source.spec).items()}
    pairs |= dict(notes) | {"edgekv.version": __version__}
    for key, value in pairs.items():
        _add_key(writer, key, value)
    writer.add_file_type(FILE_TYPES.get(quant.name.lower(), gguf.LlamaFileType.GUESSED))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _language_pairs(source: TensorSource) -> dict[str, MetaValue]:
    """Key-value pairs that a model keeps whatever becomes of its weights."""
    return {
        key: value
        for key, value in source.metadata.items()
        if key.split(".")[0] in ("tokenizer", "general")
        and key.removeprefix("general.")
        not in ("architecture", "file_type", "quantization_version", "alignment")
    }


def _add_key(writer: gguf.GGUFWriter, key: str, value: MetaValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # gguf-py cannot write an empty array
        writer.add_array(key, value)
