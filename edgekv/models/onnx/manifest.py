"""The folder that `edgekv export onnx` writes: its manifest, and the checks before an engine opens it.

edgekv.json        this manifest
model.onnx         the graph
model.onnx.data    its weights
vocab.gguf         the vocabulary and the chat template, as a GGUF without tensors
...                files for other programs: tokenizer.json, genai_config.json and the like
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgekv.documents import Document, decode, dumps, parse
from edgekv.errors import ModelFileError
from edgekv.models.identity import ModelIdentity
from edgekv.models.onnx.external_data import check_external_data
from edgekv.models.onnx.folder import DATA, GRAPH, MANIFEST, VOCABULARY

VERSION = 1
MAX_MANIFEST_NBYTES = 2**20


class FileRecord(Document, frozen=True):
    """A file of the folder as it was written."""

    nbytes: int
    sha256: str


class ModelRecord(Document, frozen=True):
    """The exported model in numbers; cache figures are of one token in all layers."""

    name: str
    arch: str
    attention: str
    n_layers: int
    n_heads: int
    n_params: int
    vocab: int
    context_length: int
    weights: str
    weights_nbytes: int
    read_nbytes: int  # weight bytes read for one decoded token
    flops: int  # of the weights, for one token
    flops_per_cached_token: int
    cache_type: str
    cache_values: int
    cache_nbytes: int


class Manifest(Document, frozen=True):
    """What is in the folder.

    Attributes:
        onnxruntime_operators: those that the ONNX standard does not have.
        source: the GGUF that it was exported from; None for another one.
    """

    format: Literal["edgekv.onnx"]
    version: int
    edgekv: str
    model: ModelRecord
    opset: int
    onnxruntime_operators: tuple[str, ...]
    files: Mapping[str, FileRecord]
    source: ModelIdentity | None = None

    def to_json(self) -> str:
        return dumps(self, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ModelFileError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_NBYTES:
            raise ModelFileError(f"{path}: is far too large for a manifest; export the model again")
        content = parse(path.read_bytes())
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ModelFileError(f"{path}: is of version {version}, this EdgeKV reads {VERSION}; upgrade it")
        return decode(Manifest, content)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read: {error.strerror}; name a folder that `edgekv export onnx` wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is damaged ({error}); export the model again") from None


def check_folder(folder: Path) -> Manifest:
    """Make sure that all files are there, whole, and that no weight lies outside of the folder.

    Raises:
        ModelFileError: not so.
    """
    manifest = read_manifest(folder)
    for name in (GRAPH, DATA, VOCABULARY):
        if name not in manifest.files:
            raise ModelFileError(f"{folder / MANIFEST}: does not list {name}; export the model again")
    for name, record in manifest.files.items():
        if Path(name).name != name:
            raise ModelFileError(f"{folder / MANIFEST}: {name!r} is not a file name; do not use this folder")
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.nbytes:
            found = (
                "is missing" if size is None else f"has {size} bytes and was exported with {record.nbytes}"
            )
            raise ModelFileError(f"{path}: {found}; copy or export it again")
    check_external_data(folder / GRAPH, folder / DATA)
    return manifest
