"""Files of an ONNX folder by name, and whether a path is one: all that a process without onnxruntime has to know."""

from __future__ import annotations

import contextlib
from pathlib import Path

MANIFEST, GRAPH, DATA, VOCABULARY = "edgekv.json", "model.onnx", "model.onnx.data", "vocab.gguf"


def is_onnx_folder(path: Path) -> bool:
    """Whether this is a folder that `edgekv export onnx` wrote."""
    with contextlib.suppress(OSError):  # what cannot be looked at gets its error from the reader of models
        return (path / MANIFEST).is_file()
    return False


def language_file(model: Path) -> Path:
    """The GGUF that holds a model's vocabulary and chat template: the model itself, or one in its folder."""
    return model / VOCABULARY if is_onnx_folder(model) else model
