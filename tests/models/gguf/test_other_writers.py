"""GGUFs as other programs write them: several parts, other alignments, numbers by layer, keys that say nothing new.

Oracle: llama.cpp, which runs each of them as it runs the plain file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.llama_cpp.fits import require_memory
from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.evaluate.model_under_test import read_tokenizer
from edgekv.export.gguf.quantize import quantize_gguf
from edgekv.export.gguf.write import write_gguf
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.parts import read_parts
from edgekv.models.gguf.source import GGUFSource
from edgekv.source import Array

Write = Callable[..., Path]


@pytest.fixture
def write(tiny_llama: Path, tmp_path: Path) -> Write:
    """Writes `tiny_llama` again under a name, with other keys, an alignment, or a share of the tensors."""

    def written(
        name: str = "model.gguf",
        keys: dict[str, Any] | None = None,
        alignment: int = 0,
        only: slice = slice(None),
    ) -> Path:
        reader, path = gguf.GGUFReader(tiny_llama), tmp_path / name
        writer = gguf.GGUFWriter(path, "llama")
        if alignment:
            writer.add_custom_alignment(alignment)
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kinds = field.types
                writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None)
        adders = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        for key, value in (keys or {}).items():
            writer.kv_data[0].pop(key, None)
            special = {"split.no": writer.add_uint16, "split.count": writer.add_uint16}
            special |= {"split.tensors.count": writer.add_int32}
            special.get(key, adders[type(value)])(key, value)
        for tensor in reader.tensors[only]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


@pytest.fixture
def parts(tiny_llama: Path, write: Write) -> list[Path]:
    n = len(read_header(tiny_llama).tensors)
    keys = [{"split.no": no, "split.count": 3, "split.tensors.count": n} for no in range(3)]
    return [
        write(f"my model-0000{no + 1}-of-00003.gguf", keys[no], only=slice(no, None, 3)) for no in range(3)
    ]


def logits(path: Path) -> Array:
    backend = LlamaCppBackend(path, n_ctx=256, n_threads=1)
    found = backend.prefill([1, 2, 3])
    backend.close()
    return found


def test_the_first_of_several_parts_runs_as_the_whole(tiny_llama: Path, parts: list[Path]) -> None:
    assert {t.name for t in read_parts(parts[0]).tensors} == {t.name for t in read_header(tiny_llama).tensors}
    assert np.array_equal(logits(parts[0]), logits(tiny_llama))


def test_parts_must_fit_in_memory_as_the_whole_must(
    tiny_llama: Path, parts: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 100000 kB\n")

    def refusal(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            require_memory(path, read_parts(path), 10**7, "f16", 128, tmp_path)
        return str(caught.value).removeprefix(str(path))

    assert refusal(parts[0]) == refusal(tiny_llama)


def test_another_part_names_the_first(parts: list[Path]) -> None:
    for use in (read_parts, LlamaCppBackend, read_tokenizer):
        with pytest.raises(
            ModelFileError, match=r"part 2 of 3 of a model; name the first, my model-00001-of-"
        ):
            use(parts[1])
    for number, part in enumerate(parts, start=1):
        with pytest.raises(
            UnsupportedError, match=rf"part {number} of 3 .*--merge '.*my model-00001-of-00003.gguf' "
        ):
            GGUFSource(part)


def test_a_part_that_is_missing_damaged_or_renamed_is_named(parts: list[Path]) -> None:
    sound = parts[2].read_bytes()
    parts[2].write_bytes(sound[:-1])
    with pytest.raises(ModelFileError, match=r"00003-of-00003\.gguf: the file ends at byte"):
        LlamaCppBackend(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelFileError, match=r"00003-of-00003\.gguf: tensor .* is in another part as well"):
        LlamaCppBackend(parts[0])
    parts[2].unlink()
    with pytest.raises(ModelFileError, match=r"00003-of-00003\.gguf: part 3 of 3 of the model is missing"):
        LlamaCppBackend(parts[0])
    with pytest.raises(ModelFileError, match=r"must end in -00001-of-00003\.gguf"):
        LlamaCppBackend(parts[0].rename(parts[0].with_name("model.gguf")))


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_every_alignment_runs_and_what_is_made_of_it_is_sound(
    tiny_llama: Path, write: Write, tmp_path: Path, alignment: int
) -> None:
    path = write(alignment=alignment)
    assert np.array_equal(logits(path), logits(tiny_llama))
    write_gguf(GGUFSource(path), tmp_path / "again.gguf", "f32", {}, False, lambda *_: None)
    assert np.array_equal(logits(tmp_path / "again.gguf"), logits(tiny_llama))
    quantize_gguf(path, tmp_path / "q8_0.gguf", "q8_0", {}, Quantizer(path), False, lambda *_: None)
    assert all(t.offset % 32 == 0 for t in read_header(tmp_path / "q8_0.gguf").tensors)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_a_number_by_layer(tiny_llama: Path, write: Write, key: str) -> None:
    spec = GGUFSource(tiny_llama).spec
    number = read_header(tiny_llama).metadata[f"llama.{key}"]
    path = write(keys={f"llama.{key}": [number] * spec.n_layers})
    assert GGUFSource(path).spec == spec
    assert np.array_equal(logits(path), logits(tiny_llama))
    with pytest.raises(UnsupportedError, match=f"a different llama.{key} in each layer"):
        GGUFSource(write(keys={f"llama.{key}": [*[number] * (spec.n_layers - 1), 1]}))
    with pytest.raises(ModelFileError, match="not one for each layer"):
        GGUFSource(write(keys={f"llama.{key}": [number] * (spec.n_layers + 1)}))


def test_a_list_where_llama_cpp_wants_one_number(write: Write) -> None:
    with pytest.raises(ModelFileError, match=r"context_length is \[512, 512\], a whole number"):
        GGUFSource(write(keys={"llama.context_length": [512, 512]}))


NEUTRAL: dict[str, tuple[Any, Any]] = {  # what says nothing new, and what does
    "attention.sliding_window": (0, 64),
    "attention.clamp_kqv": (0.0, 8.0),
    "attn_logit_softcapping": (0.0, 30.0),
    "logit_scale": (1.0, 0.5),
    "residual_scale": (1.0, 0.2),
    "embedding_scale": (1.0, 12.0),
    "use_parallel_residual": (False, True),
    "pooling_type": (0, 1),
    "rope.dimension_sections": ([0, 0, 0, 0], [8, 8, 0, 0]),
    "rope.scaling.yarn_ext_factor": (-1.0, 0.5),
    "nextn_predict_layers": (0, 1),
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_with_neutral_values(tiny_llama: Path, write: Write, key: str) -> None:
    neutral, other = NEUTRAL[key]
    assert GGUFSource(write(keys={f"llama.{key}": neutral})).spec == GGUFSource(tiny_llama).spec
    with pytest.raises(UnsupportedError, match=f"whose llama.{key} is"):
        GGUFSource(write(keys={f"llama.{key}": other}))


def test_keys_that_say_what_the_model_does_without_them(tiny_llama: Path, write: Write) -> None:
    spec = GGUFSource(tiny_llama).spec
    keys = {"attention.scale": spec.layers[0].attention.score_scale, "embedding_length_out": spec.dim}
    for key, value in keys.items():
        assert GGUFSource(write(keys={f"llama.{key}": value})).spec == spec
        with pytest.raises(UnsupportedError, match=f"whose llama.{key} is"):
            GGUFSource(write(keys={f"llama.{key}": 2 * value}))
