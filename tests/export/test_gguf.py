"""GGUF out: bytes against gguf-py, metadata complete, and never half a file."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from edgekv.errors import OutputError
from edgekv.export.gguf.write import KEEP, WEIGHT_TYPES, tensor_type, write_gguf
from edgekv.models.gguf.header import read_header
from edgekv.models.open import open_model
from edgekv.source import Array, LazySource, TensorSource


def write(source: TensorSource, path: Path, weights: str = "f32", force: bool = False) -> Path:
    write_gguf(source, path, weights, {"edgekv.method": "test"}, force, lambda *_: None)
    return path


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_round_trip_of_every_weight_type(tiny_llama: Path, tmp_path: Path, weights: str) -> None:
    """Stored bytes are gguf-py's own quantization of the source, read back by gguf-py's own reader."""
    source = open_model(tiny_llama)
    path = write(source, tmp_path / "out.gguf", weights)
    read_header(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tuple(tensors) == source.names()
    for name, tensor in tensors.items():
        original = source.load(name)
        expected = tensor_type(name, original.shape, WEIGHT_TYPES[weights])
        assert tensor.tensor_type == expected
        assert tuple(tensor.shape.tolist()) == original.shape[::-1]
        stored = gguf.quants.quantize(original, expected)
        np.testing.assert_array_equal(np.asarray(tensor.data), stored)
        np.testing.assert_array_equal(open_model(path).load(name), gguf.quants.dequantize(stored, expected))


def test_which_tensor_gets_which_type() -> None:
    q4, q8, f16, f32, bf16 = QuantType.Q4_0, QuantType.Q8_0, QuantType.F16, QuantType.F32, QuantType.BF16
    assert tensor_type("blk.0.ffn_up.weight", (96, 64), q4) == q4
    assert tensor_type("blk.0.attn_norm.weight", (64,), q4) == f32
    assert tensor_type("token_embd.weight", (260, 64), q4) == q8
    assert tensor_type("output.weight", (260, 64), q4) == q8
    assert tensor_type("blk.0.attn_k_b.weight", (4, 37, 16), q4) == f16, "rows of 16 are no blocks of 32"
    for weights, expected in ((q4, f32), (f16, f32), (f32, f32), (bf16, bf16)):
        assert tensor_type("blk.0.attn_kv_a_mqa.weight", (96, 64), weights) == expected


def test_keep_copies_bytes_and_quantizes_what_is_new(
    smollm2: Path, make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    """A real file's tensors, F32 and Q4_1, beside one that is computed."""
    real = open_model(smollm2)
    own = make_llama()
    source = LazySource(own.spec, own.metadata)
    for name in own.names():
        source.add_array(name, own.load(name))
    borrowed = ("blk.7.ffn_up.weight", "blk.7.attn_norm.weight")
    for name in borrowed:
        source.borrow(real, name)
    tensors = {
        tensor.name: tensor for tensor in gguf.GGUFReader(write(source, tmp_path / "o.gguf", KEEP)).tensors
    }
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    for name in borrowed:
        assert tensors[name].tensor_type == originals[name].tensor_type
        assert tensors[name].data.tobytes() == originals[name].data.tobytes()
    assert {originals[name].tensor_type for name in borrowed} == {QuantType.Q4_1, QuantType.F32}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == QuantType.Q8_0


def test_a_rewritten_model_keeps_its_metadata(smollm2: Path, tmp_path: Path) -> None:
    """Everything of tokenizer and general comes through; the architecture's keys give the same spec."""
    before = open_model(smollm2)
    after = open_model(write(before, tmp_path / "out.gguf", KEEP))
    renewed = {"general.file_type", "general.quantization_version"}
    for key, value in before.metadata.items():
        if key.split(".")[0] in ("tokenizer", "general") and key not in renewed and value != []:
            assert after.metadata[key] == value, key
    assert after.spec == before.spec
    assert after.metadata["edgekv.method"] == "test"
    assert after.metadata["edgekv.version"]
    assert after.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1


def test_a_converted_model_has_every_key_llama_cpp_reads(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource], tmp_path: Path
) -> None:
    source = make_llama()
    path = write(make_mla(source, 37, 18, "transmla"), tmp_path / "out.gguf")
    metadata = open_model(path).metadata
    assert metadata["general.architecture"] == "deepseek2"
    expected = {
        "block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
        "vocab_size": 260, "attention.head_count": 4, "attention.head_count_kv": 1, "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": 37, "attention.key_length": 37 + 18, "attention.value_length": 37,
        "attention.key_length_mla": 16 + 18, "attention.value_length_mla": 32, "rope.dimension_count": 18,
        "leading_dense_block_count": 3, "expert_feed_forward_length": 0, "expert_shared_count": 0,
        "expert_count": 0, "expert_used_count": 0,
    }  # fmt: skip
    found = {key.removeprefix("deepseek2."): value for key, value in metadata.items() if "deepseek2." in key}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found.pop("rope.freq_base") == pytest.approx(10000.0 ** (18 / 32))
    assert found == expected
    assert {k: v for k, v in metadata.items() if "tokenizer" in k} == {
        k: v for k, v in source.metadata.items() if "tokenizer" in k
    }


def test_every_kind_of_note_is_stored(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    notes = {
        "edgekv.text": "ä", "edgekv.flag": True, "edgekv.count": 7, "edgekv.big": 2**40, "edgekv.below": -3,
        "edgekv.share": 0.5, "edgekv.many": [0.25, 0.5], "edgekv.words": ["a", "b"],
    }  # fmt: skip
    write_gguf(make_llama(), tmp_path / "o.gguf", "f32", notes, False, lambda *_: None)
    found = open_model(tmp_path / "o.gguf").metadata
    assert {key: found[key] for key in notes} == notes


class TestAllOrNothing:
    def test_existing_output_needs_force(self, make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
        out = tmp_path / "out.gguf"
        out.write_bytes(b"precious")
        with pytest.raises(OutputError, match="--force"):
            write(make_llama(), out)
        assert out.read_bytes() == b"precious"
        write(make_llama(), out, force=True)
        read_header(out)
        assert os.listdir(tmp_path) == ["out.gguf"]

    def test_output_may_replace_the_file_it_is_made_from(self, tiny_llama: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(tiny_llama.read_bytes())
        expected = {name: open_model(path).load(name) for name in open_model(path).names()}
        write(open_model(path), path, force=True)
        for name, array in expected.items():
            np.testing.assert_array_equal(open_model(path).load(name), array)

    def test_no_folder(self, make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="mkdir -p"):
            write(make_llama(), tmp_path / "none" / "out.gguf")
        with pytest.raises(OutputError, match="is a folder"):
            write(make_llama(), tmp_path)
        with pytest.raises(OutputError, match="cannot write in /proc"):
            write(make_llama(), Path("/proc/out.gguf"))

    @pytest.mark.parametrize("limit", [0, 1000, 40_000, 300_000])
    def test_a_full_disk(self, make_llama: Callable[..., LazySource], tmp_path: Path, limit: int) -> None:
        """Wherever it strikes: in the header, the metadata, the first tensor or a late one."""
        source = make_llama()
        with no_file_past(limit), pytest.raises(OutputError, match="free some space") as caught:
            write(source, tmp_path / "out.gguf")
        assert "None" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_source_that_fails_leaves_nothing(
        self, make_llama: Callable[..., LazySource], tmp_path: Path
    ) -> None:
        source = make_llama()

        def fail() -> Array:
            raise OSError(errno.EIO, "Input/output error")

        source.add("blk.2.ffn_up.weight", (96, 64), fail)
        with pytest.raises(OutputError, match="Input/output"):
            write(source, tmp_path / "out.gguf")
        assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def no_file_past(nbytes: int) -> Iterator[None]:
    """Files larger than so many bytes cannot be written: Python ignores SIGXFSZ, so writes fail.

    Only around the write itself: pytest's own output may go to a file that is longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
