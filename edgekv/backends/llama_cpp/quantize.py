"""llama.cpp's quantization, run in this process: only edgekv.backends.isolated.quantizer_child calls it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekv.backends.llama_cpp.library import LOG, llama
from edgekv.errors import BackendError, OutputError
from edgekv.models.gguf.header import DEFAULT_ALIGNMENT, kept_header
from edgekv.progress import Progress
from edgekv.source import Array

MAX_BUFFER_NBYTES = 256 * 2**20  # rows in memory at once; llama.cpp's default is 8 GiB
# Logged before the tensor's data are read: src/llama-quant.cpp, the main loop of llama_model_quantize_impl.
_TENSOR_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")


def quantize_file(
    source: Path,
    output: Path,
    file_type: int,
    importance: Mapping[str, Array],
    keep: Mapping[str, int],
    n_threads: int,
    progress: Progress,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Write a quantized copy of a GGUF file with llama_model_quantize.

    Args:
        file_type: enum llama_ftype.
        importance: E[x^2] of the inputs of tensors, by tensor name; may be empty.
        keep: ggml type by tensor name, for tensors whose type the file type must not choose.
        ready: called with each tensor's name before its data are read; may wait until they are written.

    Raises:
        BackendError: the engine is not installed, or refused the model.
        OutputError: the output could not be written.
    """
    api = llama()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, n_threads
    params.allow_requantize = True
    params.max_buf_size = MAX_BUFFER_NBYTES
    held = _importance_data(api, importance)
    if importance:
        params.imatrix = held
    overrides = (api.llama_model_tensor_override * (len(keep) + 1))()
    for entry, (name, kind) in zip(overrides, keep.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), kind
    params.tt_overrides = overrides
    if (
        "general.alignment" in kept_header(source).metadata
    ):  # llama.cpp pads to 32 and copies what the source says
        aligned = (api.llama_model_kv_override * 2)()
        aligned[0].key, aligned[0].tag = b"general.alignment", api.LLAMA_KV_OVERRIDE_TYPE_INT
        aligned[0].value.val_i64 = DEFAULT_ALIGNMENT
        params.kv_overrides = aligned

    def log(level: int, text: bytes, _: object) -> None:
        LOG.write(level, text)
        if match := _TENSOR_LINE.search(text.decode("utf-8", "replace")):
            if ready is not None:
                ready(match[3])
            progress(int(match[1]), int(match[2]))

    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    LOG.clear()
    status = api.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params))
    if status != 0:
        cause = LOG.cause()
        if "iostream error" in cause or "basic_ios" in cause:
            raise OutputError(f"writing {output} failed, the disk may be full; free some space and try again")
        raise BackendError(f"llama.cpp could not quantize {source}: {cause}")


def _importance_data(api: Any, importance: Mapping[str, Array]) -> Any:
    """An array of llama_model_imatrix_data that ends with an entry without a name."""
    data = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(data, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return data
