"""GQA against PyTorch's attention; MLA's two forms against each other; the cache in pieces and at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekv.cache.store import KVCache
from edgekv.models.open import open_model
from edgekv.reference.attention import QUERY_CHUNK, attend
from edgekv.reference.model import ReferenceModel
from edgekv.source import LazySource, TensorSource

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 2 * QUERY_CHUNK + 9).tolist()


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_tokens", [1, 3, QUERY_CHUNK, QUERY_CHUNK + 1, 150])
@pytest.mark.parametrize("n_past", [0, 1, 70])
def test_attend_is_torchs(n_tokens: int, n_past: int) -> None:
    """Grouped heads, a cache longer than the queries, values narrower than keys."""
    total = n_tokens + n_past
    q, k, v = normal(n_tokens, 6, 16), normal(2, total, 16), normal(2, total, 8)
    mask = torch.ones(n_tokens, total, dtype=torch.bool).tril(n_past)
    expected = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q.swapaxes(0, 1)), torch.from_numpy(k).repeat_interleave(3, 0),
        torch.from_numpy(v).repeat_interleave(3, 0), attn_mask=mask, scale=0.3,
    )  # fmt: skip
    np.testing.assert_allclose(attend(q, k, v, 0.3), expected.numpy().swapaxes(0, 1), atol=1e-5)


def test_attend_leaves_its_inputs_alone() -> None:
    q, k, v = normal(4, 2, 8), normal(2, 4, 8), normal(2, 4, 8)
    copies = q.copy(), k.copy(), v.copy()
    attend(q, k, v, 2.0)
    for array, copy in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def logits(model: ReferenceModel, tokens: list[int], pieces: list[int]) -> np.ndarray:
    """Logits of tokens fed in pieces of so many."""
    cache, out, start = model.new_cache(len(tokens)), [], 0
    for piece in pieces:
        out.append(model.logits(model.hidden(tokens[start : start + piece], cache)))
        start += piece
    assert cache.n_past == start == len(tokens)
    return np.concatenate(out)


@pytest.mark.parametrize(("rank", "rope_dim"), [(32, 32), (7, 2), (64, 18)])
def test_naive_and_absorbed_mla_agree(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource], rank: int, rope_dim: int
) -> None:
    source = make_mla(make_llama(), rank, rope_dim)
    absorbed, naive = (ReferenceModel(source, form) for form in ("absorbed", "naive"))
    a, b = (logits(model, TOKENS, [100, 1, len(TOKENS) - 101]) for model in (absorbed, naive))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
    assert np.abs(a - b).max() > 0, "computed in two ways"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mla"])
def test_pieces_give_what_all_at_once_gives(name: str, request: pytest.FixtureRequest) -> None:
    model = ReferenceModel(open_model(request.getfixturevalue(name)))
    n = len(TOKENS)
    whole = logits(model, TOKENS, [n])
    for pieces in ([1] * n, [QUERY_CHUNK, n - QUERY_CHUNK], [5, 1, 60, n - 66]):
        np.testing.assert_allclose(logits(model, TOKENS, pieces), whole, atol=2e-4)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mla"])
def test_trim_goes_back_in_time(name: str, request: pytest.FixtureRequest) -> None:
    model = ReferenceModel(open_model(request.getfixturevalue(name)))
    cache = model.new_cache(64)
    model.hidden(TOKENS[:20], cache)
    expected = model.hidden(TOKENS[20:30], cache)
    model.hidden([1, 2, 3], cache)
    cache.trim(20)
    np.testing.assert_array_equal(model.hidden(TOKENS[20:30], cache), expected)
    cache.trim(0)
    assert cache.n_past == 0


def test_the_future_is_not_seen(tiny_llama: Path, tiny_mla: Path) -> None:
    for path in (tiny_llama, tiny_mla):
        model = ReferenceModel(open_model(path))
        before, changed = TOKENS[:100], [*TOKENS[:99], TOKENS[99] ^ 1]
        np.testing.assert_array_equal(logits(model, before, [100])[:99], logits(model, changed, [100])[:99])


@pytest.mark.parametrize("kind", ["gqa", "every trait", "absorbed", "naive"])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 1, 4], [12]])
def test_sequences_side_by_side_give_what_each_gives_alone(
    make_llama: Callable[..., LazySource],
    make_mla: Callable[..., TensorSource],
    kind: str,
    pieces: list[int],
) -> None:
    traits = {"qk_norm": True, "window": 5, "softcap": 4.0, "bias": True} if kind == "every trait" else {}
    source: TensorSource = make_llama(**traits)
    if kind in ("absorbed", "naive"):
        source = make_mla(source, 32, 32)
    model = ReferenceModel(source, "naive" if kind == "naive" else "absorbed")
    tokens = np.array(TOKENS[:36]).reshape(3, 12)
    cache, out, start = model.new_cache(12, n_sequences=3), [], 0
    for piece in pieces:
        out.append(model.logits(model.hidden(tokens[:, start : start + piece], cache)))
        start += piece
    alone = np.stack([logits(model, row, [12]) for row in tokens.tolist()])
    np.testing.assert_allclose(np.concatenate(out, axis=1), alone, atol=2e-4)
    assert cache.nbytes == 3 * model.new_cache(12).nbytes


def test_cache_takes_what_the_spec_says(tiny_llama: Path, tiny_mla: Path) -> None:
    for path in (tiny_llama, tiny_mla):
        spec = open_model(path).spec
        assert KVCache(spec, 10).nbytes == 10 * 4 * spec.cache_values
    with pytest.raises(AssertionError):
        ReferenceModel(open_model(tiny_llama)).hidden([1, 2], KVCache(spec, 1))
