"""Q6_K written in NumPy, read by gguf-py, beside llama.cpp's own quantizer."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.backends.llama_cpp.library import llama
from edgekv.quant.q6_k import BLOCK, quantize_q6_k

Q6_K = gguf.GGMLQuantizationType.Q6_K


def ggml() -> ctypes.CDLL:
    """The library in which llama.cpp quantizes."""
    folder = Path(llama().__file__).parent / "lib"
    return ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))


def error(array: np.ndarray, blocks: np.ndarray) -> float:
    """Relative error of what gguf-py reads from the blocks."""
    read = gguf.quants.dequantize(blocks, Q6_K).reshape(array.shape)
    return float(np.linalg.norm(read - array) / np.linalg.norm(array))


@pytest.mark.parametrize("tail", [False, True], ids=["gaussian", "with outliers"])
def test_its_error_is_that_of_llama_cpp(tail: bool) -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((64, BLOCK), np.float32) * 0.02
    if tail:
        array *= rng.standard_normal(array.shape, np.float32) ** 2
    theirs = np.empty((64, 210), np.uint8)
    ggml().ggml_quantize_chunk(
        int(Q6_K), ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(theirs.ctypes.data),
        ctypes.c_int64(0), ctypes.c_int64(64), ctypes.c_int64(BLOCK), None,
    )  # fmt: skip
    assert error(array, quantize_q6_k(array)) < 1.02 * error(array, theirs)


def test_blocks_cross_rows_and_zeros_stay() -> None:
    array = np.random.default_rng(1).standard_normal((4, 96, 32)).astype(np.float32)
    array[1] = 0
    read = gguf.quants.dequantize(quantize_q6_k(array), Q6_K).reshape(array.shape)
    assert not read[1].any()
    assert np.abs(read - array).max() < 0.08


def test_a_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize_q6_k(np.zeros(255, np.float32))
