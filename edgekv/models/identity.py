"""Which model a cache belongs to: what a session or a pack must share with the model that opens it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgekv.documents import Document
from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.layout import TensorInfo
from edgekv.models.gguf.parts import part_count, part_name, read_parts
from edgekv.models.gguf.spec import spec_from_gguf
from edgekv.spec import MLA, RopeSpec

SAMPLE_NBYTES = 4096  # read at the start, in the middle and at the end of every tensor


class ModelIdentity(Document, frozen=True):
    """A model, told from others by its weights and by what decides the values in its cache.

    Attributes:
        name: for people.
        tensors: SHA-256 over every tensor's name, shape, type and three samples of its bytes: hashing all of them
            would take seconds per gigabyte at every start.
        ranks: of each layer's latent, 0 where keys and values are cached; empty for a model that only the engine knows.
        ropes: each layer's rotary embedding.
    """

    name: str
    tensors: str
    ranks: tuple[int, ...] = ()
    ropes: tuple[RopeSpec, ...] = ()

    @property
    def is_latent(self) -> bool:
        """Whether every layer caches a latent and one rope key, so that its rows can be moved."""
        return bool(self.ranks) and all(self.ranks)


def gguf_identity(path: Path) -> ModelIdentity:
    """The identity of a GGUF file, or of the first of its parts.

    Raises:
        ModelFileError: it is malformed.
    """
    header = read_header(path)
    if (count := part_count(header.metadata)) == 1:
        found = [(path, tensor) for tensor in header.tensors]
    else:
        header = read_parts(path)
        parts = [path, *(path.with_name(part_name(path, number)) for number in range(2, count + 1))]
        found = [(part, tensor) for part in parts for tensor in read_header(part).tensors]
    name = str(header.metadata.get("general.name", path.stem))
    digest = hashlib.sha256()
    for file, tensor in sorted(found, key=lambda pair: pair[1].name):
        digest.update(f"{tensor.name} {tensor.dims} {tensor.ggml_type}\n".encode())
        digest.update(_samples(file, tensor))
    shapes = {tensor.name: tensor.dims[::-1] for tensor in header.tensors}
    try:
        attentions = [layer.attention for layer in spec_from_gguf(header.metadata, shapes, path).layers]
    except (ModelFileError, UnsupportedError):  # an architecture that only llama.cpp knows
        return ModelIdentity(name, digest.hexdigest())
    ranks = tuple(each.kv_lora_rank if isinstance(each, MLA) else 0 for each in attentions)
    return ModelIdentity(name, digest.hexdigest(), ranks, tuple(each.rope for each in attentions))


def _samples(path: Path, tensor: TensorInfo) -> bytes:
    last = max(tensor.nbytes - SAMPLE_NBYTES, 0)
    with path.open("rb") as file:
        pieces = []
        for start in sorted({0, last // 2, last}):
            file.seek(tensor.offset + start)
            pieces.append(file.read(min(SAMPLE_NBYTES, tensor.nbytes)))
    return b"".join(pieces)
