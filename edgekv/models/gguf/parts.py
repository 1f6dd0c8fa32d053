"""Parts of a model that llama-gguf-split cut: their names, and one header of them all.

llama.cpp opens the first part and finds the others by their names (src/llama.cpp, llama_split_path); keys are in the
first alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.layout import GGUFHeader
from edgekv.spec import MetaValue

_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


def read_parts(path: Path) -> GGUFHeader:
    """The header of a file with a whole model, or of its first part with the tensors of all parts, each checked.

    Raises:
        ModelFileError: a part is malformed or missing, or this is not the first.
    """
    header = read_header(path)
    count = part_count(header.metadata)
    if count == 1:
        return header
    require_first(header.metadata, path)
    if part_name(path, 1) != path.name or f"-of-{count:05d}.gguf" not in path.name:
        raise ModelFileError(
            f"{path}: is part 1 of {count} of a model, and llama.cpp finds the others by its name, which must end in "
            f"-00001-of-{count:05d}.gguf; rename it as it was"
        )
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for number in range(2, count + 1):
        part = path.with_name(part_name(path, number))
        if not part.exists():
            raise ModelFileError(
                f"{part}: part {number} of {count} of the model is missing; put it beside the first"
            )
        for tensor in read_header(part).tensors:
            if tensor.name in tensors:
                raise ModelFileError(
                    f"{part}: tensor {tensor.name} is in another part as well; download the parts again"
                )
            tensors[tensor.name] = tensor
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith("split.")}
    return replace(header, metadata=MappingProxyType(metadata), tensors=tuple(tensors.values()))


def require_first(metadata: Mapping[str, MetaValue], path: Path) -> None:
    """Raise ModelFileError for the keys of a part that is not the first, in which those of the model are."""
    if (number := _number(metadata)) > 1:
        raise ModelFileError(
            f"{path}: is part {number} of {part_count(metadata)} of a model; name the first, {part_name(path, 1)}"
        )


def require_whole(metadata: Mapping[str, MetaValue], path: Path) -> None:
    """Raise UnsupportedError, with the way to join them, for the keys of one part of several."""
    if (count := part_count(metadata)) > 1:
        first = path.with_name(part_name(path, 1))
        raise UnsupportedError(
            f"{path}: is part {_number(metadata)} of {count} of a model; join them: llama-gguf-split --merge "
            f"{shlex.quote(str(first))} WHOLE.gguf (edgekv chat runs the first part as it is)"
        )


def part_count(metadata: Mapping[str, MetaValue]) -> int:
    """In how many files the model is."""
    count = metadata.get("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def part_name(path: Path, number: int) -> str:
    """The file name of another part; of a renamed file, how it must end."""
    match = _NAME.fullmatch(path.name)
    return f"{match[1]}-{number:05d}-of-{match[2]}.gguf" if match else f"...-{number:05d}-of-....gguf"


def _number(metadata: Mapping[str, MetaValue]) -> int:
    """Which part this is, from 1."""
    number = metadata.get("split.no", 0)
    return number + 1 if isinstance(number, int) else 1
