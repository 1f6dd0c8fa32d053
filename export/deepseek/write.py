"""A model folder in DeepseekV3 format, complete or not there at all."""

from __future__ import annotations

import json
from pathlib import Path

from edgekv.export.deepseek.safetensors_file import DType, write_safetensors
from edgekv.export.deepseek.tensors import check_exportable, config, tensors
from edgekv.export.tokenizer_json import generation_config, tokenizer_config, tokenizer_json
from edgekv.files import atomic_folder
from edgekv.progress import Progress
from edgekv.source import TensorSource

WEIGHTS = "model.safetensors"


def write_deepseek(
    source: TensorSource, folder: Path, dtype: DType, force: bool, progress: Progress
) -> tuple[str, ...]:
    """Write config, weights, tokenizer and generation config; gives the names of the files.

    Raises:
        UnsupportedError: DeepseekV3's graph or transformers' tokenizers do not compute such a model.
        ModelFileError: the source's tokenizer is unsound.
        InputError: a weight does not fit `dtype`.
        OutputError: the folder cannot be written.
    """
    check_exportable(source.spec)
    metadata = source.metadata
    stops = generation_config(metadata)
    documents = {
        "config.json": config(source.spec, dtype, stops["bos_token_id"], stops["eos_token_id"][0]),
        "generation_config.json": stops,
        "tokenizer_config.json": tokenizer_config(metadata, source.spec.context_length),
    }
    with atomic_folder(folder, force, WEIGHTS) as partial:
        for name, document in documents.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "tokenizer.json").write_text(tokenizer_json(metadata), encoding="utf-8")
        write_safetensors(partial / WEIGHTS, tensors(source, dtype), dtype, progress)
    return (*documents, "tokenizer.json", WEIGHTS)
