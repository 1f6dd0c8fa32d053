"""Relative errors, against their definition written out."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from edgekv.quant import tensor_error
from edgekv.quant.tensor_error import StoredTensor, relative_error


def stored(array: np.ndarray, name: str, matrices: int = 1) -> StoredTensor:
    raw = gguf.quants.quantize(array, QuantType[name])
    return StoredTensor(
        np.frombuffer(raw.tobytes(), np.uint8).reshape(len(array), -1), name, array.shape[1], matrices
    )


@pytest.mark.parametrize("chunk", [2**18, 5 * 64])
def test_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_error, "CHUNK_VALUES", chunk)
    rng = np.random.default_rng(0)
    array = rng.standard_normal((24, 64)).astype(np.float32)  # two matrices of 12 rows
    importance = rng.uniform(0.1, 5, (2, 64)).astype(np.float32)
    after = gguf.quants.dequantize(gguf.quants.quantize(array, QuantType.Q4_0), QuantType.Q4_0)
    found = relative_error(stored(array, "F32", 2), stored(array, "Q4_0", 2), importance.reshape(-1))
    errors, squares = (array - after) ** 2, array**2
    weights = np.repeat(importance, 12, axis=0)
    assert found.rms == pytest.approx(np.sqrt(errors.sum() / squares.sum()), rel=1e-5)
    assert found.weighted == pytest.approx(
        np.sqrt((errors * weights).sum() / (squares * weights).sum()), rel=1e-5
    )
    assert 0.05 < found.rms < 0.15  # what four bits cost on normal weights


def test_weighted_error_is_that_of_the_output() -> None:
    """On uncorrelated inputs with those mean squares it is the relative error of W @ x."""
    rng = np.random.default_rng(1)
    array = rng.standard_normal((64, 96)).astype(np.float32)
    spread = np.exp(rng.standard_normal(96)).astype(np.float32)
    inputs = rng.standard_normal((20000, 96)).astype(np.float32) * spread
    found = relative_error(stored(array, "F32"), stored(array, "Q4_0"), (inputs**2).mean(axis=0))
    after = gguf.quants.dequantize(gguf.quants.quantize(array, QuantType.Q4_0), QuantType.Q4_0)
    exact, rounded = inputs @ array.T, inputs @ after.T
    measured = np.sqrt(((exact - rounded) ** 2).sum() / (exact**2).sum())
    assert found.weighted == pytest.approx(measured, rel=0.02)


def test_nothing_measured_and_nothing_there() -> None:
    zeros = np.zeros((4, 32), np.float32)
    found = relative_error(stored(zeros, "F32"), stored(zeros, "Q8_0"), None)
    assert (found.rms, found.weighted) == (0.0, None)


@pytest.mark.parametrize("n_matrices", [1, 5])
def test_large_tensors_are_sampled(n_matrices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every part count alike, whatever grows along the tensor; whole rows, so columns can be weighed."""
    monkeypatch.setattr(tensor_error, "CHUNK_VALUES", 4 * 64)
    rng = np.random.default_rng(2)
    array = rng.standard_normal((n_matrices * 1000, 64)).astype(np.float32)
    array *= np.linspace(0.1, 3, len(array), dtype=np.float32)[:, None]
    importance = rng.uniform(0.1, 5, n_matrices * 64).astype(np.float32)
    tensors = stored(array, "F32", n_matrices), stored(array, "Q4_0", n_matrices)
    sampled = relative_error(*tensors, importance)
    monkeypatch.setattr(tensor_error, "SAMPLE_CHUNKS", 10**6)
    whole = relative_error(*tensors, importance)
    assert whole.compared == 1
    assert sampled.compared == pytest.approx(24 * 4 / len(array))
    assert sampled.rms == pytest.approx(whole.rms, rel=0.05)
    assert sampled.weighted == pytest.approx(whole.weighted, rel=0.05)
