"""Writer of model folders in DeepseekV3 format, complete or not there at all."""

from __future__ import annotations

from pathlib import Path

from edgekv.export.deepseek.safetensors_file import DType, write_safetensors
from edgekv.export.deepseek.tensors import check_exportable, config, tensors
from edgekv.export.tokenizer_json import generation_config, write_json, write_tokenizer
from edgekv.files import atomic_folder
from edgekv.progress import Progress
from edgekv.source import TensorSource
from edgekv.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"


def write_deepseek(
    source: TensorSource, folder: Path, dtype: DType, force: bool, progress: Progress
) -> tuple[str, ...]:
    """Write config, weights, tokenizer and generation config; returns the names of the files.

    Raises:
        UnsupportedError: DeepseekV3's graph or transformers' tokenizers do not compute such a model.
        ModelFileError: the source's tokenizer is unsound.
        InputError: a weight does not fit `dtype`.
        OutputError: the folder cannot be written.
    """
    spec, metadata = source.spec, source.metadata
    check_exportable(spec)
    tokenizer = Tokenizer.from_metadata(metadata)
    stops: list[int] = generation_config(tokenizer, metadata)["eos_token_id"]
    model = config(spec, dtype, tokenizer.bos_id, stops[0] if stops else None)
    with atomic_folder(folder, force, WEIGHTS) as partial:
        write_json(partial / "config.json", model, indent=2)
        names = write_tokenizer(tokenizer, metadata, spec.context_length, partial, indent=2)
        write_safetensors(partial / WEIGHTS, tensors(source, dtype), dtype, progress)
    return ("config.json", *names, WEIGHTS)
