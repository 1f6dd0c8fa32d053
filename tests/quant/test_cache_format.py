"""Cache types: how they are spelt, what they cost by hand, and what they refuse."""

import pytest

from edgekv.quant.cache_format import CacheFormat
from edgekv.quant.formats import CACHE_TYPES, COMMON_CACHES, FORMATS, UNQUANTIZED


@pytest.mark.parametrize("name", [*CACHE_TYPES, *COMMON_CACHES, "q4_0/q8_0", "f16/q4_0"])
def test_a_type_is_spelt_as_it_was_read(name: str) -> None:
    assert str(CacheFormat.parse(name)) == name


def test_keys_come_first_and_one_name_is_both() -> None:
    assert CacheFormat.parse("q8_0/q4_0") == CacheFormat(k=FORMATS["q8_0"], v=FORMATS["q4_0"])
    assert str(CacheFormat.parse("q8_0/q8_0")) == "q8_0"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("q3", "'q3'"),
        ("", "''"),
        ("q8_0/", "''"),
        ("/q8_0", "''"),
        ("q8_0/q3", "'q3'"),
        ("q8_0:q4_0", "'q8_0:q4_0'"),
        ("Q8_0", "'Q8_0'"),
        ("f16/f16/f16", "'f16/f16/f16'"),
        ("q2_k", "'q2_k'"),  # a format of weights
    ],
)
def test_what_is_no_cache_type(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"unknown cache type {wrong}; known: f32, .*as in q8_0/q4_0"):
        CacheFormat.parse(text)


def test_which_are_quantized() -> None:
    assert [name for name in CACHE_TYPES if not CacheFormat.parse(name).quantized] == list(UNQUANTIZED)
    assert CacheFormat.parse("f16/q4_0").quantized
    assert CacheFormat.parse("q4_0/f16").quantized


def test_bytes_of_keys_and_values() -> None:
    """SmolLM2-135M: 3 heads of 64 in 30 layers."""
    assert 30 * CacheFormat.parse("f16").kv_nbytes(3, 64, 64) == 23040
    assert 30 * CacheFormat.parse("q8_0/q4_0").kv_nbytes(3, 64, 64) == 9360
    assert 30 * CacheFormat.parse("q5_0/q4_0").kv_nbytes(3, 64, 64) == 7200
    assert CacheFormat.parse("f16/q4_0").kv_nbytes(1, 96, 32) == 96 * 2 + 18, "widths of their own"


@pytest.mark.parametrize(
    ("kind", "widths", "said"),
    [
        ("f16/q4_0", (64, 48), "V: 48 values per head do not divide into q4_0 blocks of 32"),
        ("q8_0/f16", (48, 64), "K: 48 values per head do not divide into q8_0 blocks of 32"),
        ("q8_0/q4_0", (48, 48), "K: 48 .* q8_0 blocks of 32; V: 48 .* q4_0 blocks of 32"),
    ],
)
def test_a_refusal_names_the_side(kind: str, widths: tuple[int, int], said: str) -> None:
    cache = CacheFormat.parse(kind)
    with pytest.raises(ValueError, match=f"^{said}$"):
        cache.kv_nbytes(2, *widths)


def test_a_latent_is_one_row() -> None:
    assert CacheFormat.parse("q4_0").latent_nbytes(256, 192) == 8 * 18
    with pytest.raises(ValueError, match="K and V cannot differ; take q8_0 or q4_0"):
        CacheFormat.parse("q8_0/q4_0").latent_nbytes(256, 192)
    with pytest.raises(ValueError, match="V: 48 values per head"):
        CacheFormat.parse("q8_0").latent_nbytes(64, 48)
