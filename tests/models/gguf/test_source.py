"""Models whose keys and tensors contradict each other, weights that are not numbers, mutated files."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.models.gguf.header import read_header
from edgekv.models.gguf.source import GGUFSource
from edgekv.source import LazySource
from edgekv.spec import MLA, RopeSpec


def tiny_keys() -> dict[str, Any]:
    return {
        "block_count": 1,
        "context_length": 16,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 4,
    }


TINY_SHAPES = {
    "token_embd.weight": (6, 8),
    "output_norm.weight": (8,),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (4, 8),
    "blk.0.attn_v.weight": (4, 8),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (8, 8),
    "blk.0.ffn_up.weight": (8, 8),
    "blk.0.ffn_down.weight": (8, 8),
}


def write_tiny(
    path: Path,
    keys: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    arch: str = "llama",
    dtype: type[np.generic] = np.float32,
) -> None:
    """A model of one layer; a list is written as an array, None leaves the key out."""
    writer = gguf.GGUFWriter(path, arch)
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if value is not None:
            adders[type(value)](key if key.startswith(("general.", "split.")) else f"{arch}.{key}", value)
    writer.add_token_list(list("abcdef"))
    for name, shape in shapes.items():
        writer.add_tensor(name, np.full(shape, 0.5).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tiny_model_opens(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", tiny_keys(), TINY_SHAPES)
    source = GGUFSource(tmp_path / "tiny.gguf")
    assert source.spec.tied_embeddings
    assert source.names() == tuple(TINY_SHAPES)
    for name, shape in TINY_SHAPES.items():
        assert source.shape(name) == shape
        assert np.array_equal(source.load(name), np.full(shape, 0.5))
    for model in (source, LazySource(source.spec, source.metadata)):
        with pytest.raises(ModelFileError, match=r"there is no tensor 'typo'; names\(\) lists"):
            model.load("typo")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], type[InputError], str]] = {
    "no layers": ({"block_count": 0}, ModelFileError, "block_count"),
    "absurd layers": ({"block_count": 2**31 - 1}, ModelFileError, "at most 512"),
    "a layer too many": ({"block_count": 2}, ModelFileError, "blk.1.attn_norm.weight is missing"),
    "no heads": ({"attention.head_count": 0}, ModelFileError, "head_count"),
    "no kv heads": ({"attention.head_count_kv": 0}, ModelFileError, "head_count_kv"),
    "kv heads do not divide": (
        {"attention.head_count": 4, "attention.head_count_kv": 3, "rope.dimension_count": 2},
        ModelFileError,
        "4 query heads do not divide among 3",
    ),
    "width does not divide": (
        {"attention.head_count": 3, "attention.head_count_kv": 1},
        ModelFileError,
        "divide",
    ),
    "more kv heads than heads": ({"attention.head_count_kv": 4}, ModelFileError, "divide"),
    "rope dims odd": (
        {"rope.dimension_count": 3, "attention.key_length": 3, "attention.value_length": 3},
        ModelFileError,
        "even",
    ),
    "rope dims above head": ({"rope.dimension_count": 8}, ModelFileError, "4, 4, 8"),
    "rope dims below head": ({"rope.dimension_count": 2}, ModelFileError, "4, 4, 2"),
    "no width": ({"embedding_length": 0}, ModelFileError, "embedding_length"),
    "other width": ({"embedding_length": 16, "rope.dimension_count": 8}, ModelFileError, "shape"),
    "huge width": ({"embedding_length": 2**31, "rope.dimension_count": 2**30}, ModelFileError, "embedding"),
    "no feed-forward": ({"feed_forward_length": 0}, ModelFileError, "feed_forward_length"),
    "no context": ({"context_length": 0}, ModelFileError, "context_length"),
    "missing key": ({"attention.layer_norm_rms_epsilon": None}, ModelFileError, "epsilon is missing"),
    "key of wrong type": ({"context_length": "long"}, ModelFileError, "'long'"),
    "epsilon 0": ({"attention.layer_norm_rms_epsilon": 0.0}, ModelFileError, "positive"),
    "epsilon NaN": ({"attention.layer_norm_rms_epsilon": float("nan")}, ModelFileError, "positive"),
    "theta infinite": ({"rope.freq_base": float("inf")}, ModelFileError, "positive"),
    "heads by layer": ({"attention.head_count": [2, 2]}, ModelFileError, "2 items, not one for each layer"),
    "experts": ({"expert_count": 8}, UnsupportedError, "expert_count is 8"),
    "rope scaling": (
        {"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0},
        UnsupportedError,
        "dynamic",
    ),
    "rope factor": ({"rope.scaling.factor": -4.0}, ModelFileError, "scaling.factor is -4.0"),
    "unknown key": ({"attention.softcap": 30.0}, UnsupportedError, "softcap"),
    "split model": ({"split.count": 3}, UnsupportedError, "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keys_that_contradict_the_tensors(tmp_path: Path, name: str) -> None:
    changes, kind, phrase = CONTRADICTIONS[name]
    path = tmp_path / "tiny.gguf"
    write_tiny(path, tiny_keys() | changes, TINY_SHAPES)
    with pytest.raises(kind, match=phrase) as caught:
        GGUFSource(path)
    assert str(path) in str(caught.value)
    assert ";" in str(caught.value)


def test_architecture_is_named(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", tiny_keys(), TINY_SHAPES, arch="mamba")
    with pytest.raises(UnsupportedError, match="'mamba' is not supported"):
        GGUFSource(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("missing", TINY_SHAPES)
def test_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    shapes = {name: shape for name, shape in TINY_SHAPES.items() if name != missing}
    write_tiny(tmp_path / "tiny.gguf", tiny_keys(), shapes)
    with pytest.raises(ModelFileError, match=missing):
        GGUFSource(tmp_path / "tiny.gguf")


def test_other_tensors_and_vocabularies(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, tiny_keys(), TINY_SHAPES | {"blk.0.attn_output.bias": (8,)})
    with pytest.raises(UnsupportedError, match=r"blk.0.attn_output.bias has no place"):
        GGUFSource(path)
    write_tiny(path, tiny_keys(), TINY_SHAPES | {"token_embd.weight": (7, 8)})
    with pytest.raises(ModelFileError, match=r"6 tokens, token_embd.weight has 7 rows"):
        GGUFSource(path)
    write_tiny(path, tiny_keys(), TINY_SHAPES | {"output.weight": (6, 8)})
    assert not GGUFSource(path).spec.tied_embeddings


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers_are_named(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, tiny_keys(), TINY_SHAPES)
    wanted = next(t for t in read_header(path).tensors if t.name == "blk.0.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(wanted.offset + 4 * 17)
        file.write(struct.pack("<f", bad))
    source = GGUFSource(path)
    with pytest.raises(ModelFileError, match=r"blk.0.ffn_up.weight holds NaN or infinite"):
        source.load("blk.0.ffn_up.weight")
    assert source.load("blk.0.ffn_gate.weight").shape == (8, 8)


def test_weights_of_a_type_without_dequantization_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, tiny_keys(), TINY_SHAPES, dtype=np.int8)
    with pytest.raises(UnsupportedError, match=r"token_embd.weight is stored as I8.*llama-quantize"):
        GGUFSource(path).load("token_embd.weight")


MLA_KEYS: dict[str, Any] = {
    "block_count": 1,
    "context_length": 16,
    "embedding_length": 8,
    "feed_forward_length": 8,
    "leading_dense_block_count": 1,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 0,
    "attention.kv_lora_rank": 6,
    "attention.key_length": 8,
    "attention.value_length": 6,
    "attention.key_length_mla": 5,
    "attention.value_length_mla": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 2,
    "expert_count": 0,
    "expert_shared_count": 0,
}
MLA_SHAPES = {name: shape for name, shape in TINY_SHAPES.items() if not name.startswith("blk.0.attn")} | {
    "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (10, 8),
    "blk.0.attn_kv_a_mqa.weight": (8, 8),
    "blk.0.attn_kv_a_norm.weight": (6,),
    "blk.0.attn_k_b.weight": (2, 6, 3),
    "blk.0.attn_v_b.weight": (2, 4, 6),
    "blk.0.attn_output.weight": (8, 8),
}


def test_dense_deepseek2_opens(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", MLA_KEYS, MLA_SHAPES, arch="deepseek2")
    attention = GGUFSource(tmp_path / "tiny.gguf").spec.layers[0].attention
    assert attention == MLA(2, 6, 3, 4, RopeSpec(10000.0, 2))


def test_deepseek2_scales_scores_with_its_rope(tmp_path: Path) -> None:
    """As deepseek2.cpp does, whose graph takes every factor for YaRN's."""
    keys = MLA_KEYS | {"rope.scaling.factor": 4.0}
    write_tiny(tmp_path / "tiny.gguf", keys, MLA_SHAPES, arch="deepseek2")
    attention = GGUFSource(tmp_path / "tiny.gguf").spec.layers[0].attention
    assert attention.rope.factors == (4.0,)
    assert attention.score_scale == pytest.approx((1 + 0.1 * np.log(4)) ** 2 / 5**0.5)


@pytest.mark.parametrize(
    ("changes", "kind", "phrase"),
    [
        ({"leading_dense_block_count": 0}, ModelFileError, "expert_count"),
        ({"attention.q_lora_rank": 4}, ModelFileError, "attn_q_a.weight is missing"),
        ({"rope.dimension_count": 3}, ModelFileError, "even"),
        ({"rope.dimension_count": 6}, ModelFileError, "below the head's 5"),
        ({"attention.head_count_kv": 2}, ModelFileError, "head_count_kv is 2"),
        ({"attention.key_length": 6}, ModelFileError, "key_length is 6"),
        ({"attention.value_length": 8}, ModelFileError, "value_length is 8"),
        ({"attention.kv_lora_rank": 0}, ModelFileError, "kv_lora_rank"),
        ({"attention.value_length_mla": 3}, ModelFileError, "attn_v_b.weight has shape"),
        ({"rope.scaling.factor": -4.0}, ModelFileError, "a positive number"),
    ],
)
def test_deepseek2_keys_that_contradict_the_tensors(
    tmp_path: Path, changes: dict[str, Any], kind: type[InputError], phrase: str
) -> None:
    write_tiny(tmp_path / "tiny.gguf", MLA_KEYS | changes, MLA_SHAPES, arch="deepseek2")
    with pytest.raises(kind, match=phrase):
        GGUFSource(tmp_path / "tiny.gguf")


def mutate(content: bytes, header: int, rng: random.Random) -> bytes:
    """One to four changes: bytes flipped or set to extremes, pieces cut out, doubled or cut off."""
    mutated = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(header if rng.random() < 0.95 else len(mutated)) % max(1, len(mutated))
        match rng.randrange(7):
            case 0:
                mutated[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                mutated[at : at + 1] = bytes([mutated[at] ^ 1 << rng.randrange(8)])
            case 2:
                mutated[at : at + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(
                    8, "little"
                )
            case 3:
                mutated[at : at + 4] = rng.choice((0, 1, 8, 9, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
            case 4:
                del mutated[at : at + rng.choice((1, 4, 8, 16))]
            case 5:
                mutated[at:at] = mutated[at : at + rng.choice((1, 4, 8, 64))]
            case 6:
                del mutated[at + rng.randrange(200) :]
    return bytes(mutated)


def test_mutated_files_never_crash(tmp_path: Path, llama_accepts: Callable[[Path], bool]) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path, tiny_keys(), TINY_SHAPES)
    content, header = path.read_bytes(), read_header(path).tensors[0].offset
    rng = random.Random(20240501)
    sound = refused = 0
    for _ in range(4000):
        path.write_bytes(mutate(content, header, rng))
        try:
            read_header(path)
        except ModelFileError:
            refused += 1
        else:
            assert llama_accepts(path)
            sound += 1
        with contextlib.suppress(InputError):
            source = GGUFSource(path)
            for name in source.names():
                assert source.load(name).shape == source.shape(name)
    assert sound > 200
    assert refused > 2000
