"""The door to model files: the one place that chooses a reader for a path."""

from __future__ import annotations

from pathlib import Path

from edgekv.errors import ModelFileError
from edgekv.models.gguf.canonical import canonical
from edgekv.models.gguf.source import GGUFSource
from edgekv.models.hf.source import HFSource
from edgekv.source import TensorSource


def open_model(path: Path) -> TensorSource:
    """Open a model: a GGUF file, or a Hugging Face folder of config.json, safetensors and tokenizer.json.

        source = edgekv.open_model(model)
        print(source.spec.kv_bytes_per_token("q4_0"), source.load("blk.0.attn_q.weight").shape)

    Raises:
        ModelFileError: a file is missing or malformed.
        UnsupportedError: its architecture is not handled.
    """
    try:
        return HFSource(path) if path.is_dir() else canonical(GGUFSource(path))
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ModelFileError(
            f"{path}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error


def open_with_tokenizer(path: Path) -> TensorSource:
    """Open a model that has to run as text.

    Raises:
        ModelFileError: it holds no tokenizer, or a file is missing or malformed.
        UnsupportedError: its architecture or tokenizer is not handled.
    """
    source = open_model(path)
    if "tokenizer.ggml.tokens" not in source.metadata:
        raise ModelFileError(
            f"{path}: holds no tokenizer; download tokenizer.json into the folder, or tokenizer.model"
        )
    return source
