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
from typing import Annotated, Literal

from msgspec import Meta

from edgekv.documents import Document, decode, dumps, parse
from edgekv.errors import ModelFileError
from edgekv.models.identity import ModelIdentity
from edgekv.models.onnx.external_data import check_external_data
from edgekv.models.onnx.folder import DATA, GRAPH, MANIFEST, VOCABULARY
from edgekv.spec import AttentionSpec

VERSION = 2  # 1 has no `layers`
# Slots behind a window: rows move to the front only when they are full, and as many tokens can be taken back.
WINDOW_SLACK = 64
MAX_MANIFEST_NBYTES = 2**20
MAX_WINDOW = 2**20  # tokens; a cache is allocated for whole windows, and models have up to 2^18


class FileRecord(Document, frozen=True):
    """A file of the folder as it was written."""

    nbytes: int
    sha256: str


class LayerRecord(Document, frozen=True):
    """What one layer caches: rows of `nbytes` per token, in heads (GQA) or a latent (MLA).

    window: tokens that a new one sees, itself included, or 0 for all; rows further back are let go.
    """

    kind: Literal["GQA", "MLA"]
    nbytes: Annotated[int, Meta(ge=0)]
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] = 0

    def slots(self, n_ctx: int) -> int:
        """Rows that a context of `n_ctx` tokens fills."""
        return min(self.window + WINDOW_SLACK, n_ctx) if self.window else n_ctx


class ModelRecord(Document, frozen=True):
    """The exported model in numbers; cache figures are of one token in all layers.

    layers: what each of them caches; of exports by older versions, where all are alike, it is empty.
    """

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
    layers: tuple[LayerRecord, ...] = ()

    def caches(self) -> tuple[LayerRecord, ...]:
        """What each layer caches, whatever version wrote it."""
        kind: Literal["GQA", "MLA"] = "MLA" if self.attention == "MLA" else "GQA"
        return self.layers or (LayerRecord(kind, self.cache_nbytes // self.n_layers),) * self.n_layers


def ring_window(attention: AttentionSpec, context_length: int) -> int:
    """The window of a layer whose cache lets go of what is behind it; 0 for a layer that keeps everything."""
    return attention.window if attention.window < min(context_length, MAX_WINDOW + 1) else 0


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
        manifest = decode(Manifest, content)
        if len(manifest.model.caches()) != manifest.model.n_layers:
            raise ValueError("it does not say what each layer caches")
        return manifest
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
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:  # a name that is too long
            size = None
        if size != record.nbytes:
            found = (
                "is missing" if size is None else f"has {size} bytes and was exported with {record.nbytes}"
            )
            raise ModelFileError(f"{path}: {found}; copy or export it again")
    check_external_data(folder / GRAPH, folder / DATA)
    return manifest
