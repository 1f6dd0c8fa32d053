"""Sampling against llama.cpp's own sampler chain, and its statistics."""

import ctypes
from collections import Counter

import numpy as np
import pytest

from edgekv.chat.sampling import Sampler, SamplingParams, candidates, penalized
from edgekv.errors import InputError
from edgekv.source import Array


def model_like(vocab: int, seed: int) -> Array:
    """Logits as models give them: a broad bell, and a few tokens far above it."""
    random = np.random.default_rng(seed)
    logits = random.normal(10, 3, vocab).astype(np.float32)
    logits[random.choice(vocab, 30, replace=False)] += random.gamma(3, 4, 30).astype(np.float32)
    return logits


def llama_candidates(logits: Array, params: SamplingParams) -> list[int]:
    """What llama.cpp's top-k, top-p and min-p samplers leave, likeliest first."""
    from edgekv.backends.llama_cpp.library import llama

    api = llama()
    array_type = api.llama_token_data * len(logits)
    data = array_type(*[api.llama_token_data(i, x, 0.0) for i, x in enumerate(logits.tolist())])
    array = api.llama_token_data_array(data, len(logits), -1, False)
    for sampler in (
        api.llama_sampler_init_top_k(params.top_k),
        api.llama_sampler_init_top_p(params.top_p, 1),
        api.llama_sampler_init_min_p(params.min_p, 1),
    ):
        api.llama_sampler_apply(sampler, ctypes.byref(array))
        api.llama_sampler_free(sampler)
    left = [(array.data[i].logit, array.data[i].id) for i in range(array.size)]
    return [token for _, token in sorted(left, key=lambda item: (-item[0], item[1]))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_k=5, top_p=1.0, min_p=0.0),
        SamplingParams(top_k=0, top_p=0.9, min_p=0.0),
        SamplingParams(top_k=0, top_p=0.999, min_p=0.0),
        SamplingParams(top_k=0, top_p=1.0, min_p=0.02),
        SamplingParams(top_k=0, top_p=0.7, min_p=0.1),
        SamplingParams(top_k=2000, top_p=0.97, min_p=0.001),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=1.0),
    ],
    ids=lambda p: f"k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_candidates_equal_llama_cpp(params: SamplingParams, seed: int) -> None:
    logits = model_like(8000, seed)
    assert candidates(logits, params).tolist() == llama_candidates(logits, params)


def test_without_filters_every_token_is_a_candidate() -> None:
    params = SamplingParams(top_k=9999999, top_p=1.0, min_p=0.0)
    assert sorted(candidates(model_like(8000, 0), params).tolist()) == list(range(8000))


def test_repeat_penalty_equals_llama_cpp() -> None:
    from edgekv.backends.llama_cpp.library import llama

    logits = model_like(500, 0) - 12
    recent = [3, 7, 7, 400, 3]
    api = llama()
    data = (api.llama_token_data * 500)(
        *[api.llama_token_data(i, x, 0.0) for i, x in enumerate(logits.tolist())]
    )
    array = api.llama_token_data_array(data, 500, -1, False)
    sampler = api.llama_sampler_init_penalties(500, 64, 1.3, 0.0, 0.0)
    for token in recent:
        api.llama_sampler_accept(sampler, token)
    api.llama_sampler_apply(sampler, ctypes.byref(array))
    api.llama_sampler_free(sampler)
    expected = [data[i].logit for i in range(500)]
    np.testing.assert_allclose(penalized(logits, recent, 1.3), expected, rtol=1e-6)
    assert np.count_nonzero(penalized(logits, recent, 1.3) != logits) == 3


def test_draws_follow_the_tempered_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    n = 20_000
    counts = Counter(sampler.sample(logits) for _ in range(n))
    expected = np.sqrt([0.5, 0.3, 0.15, 0.05])
    expected /= expected.sum()
    observed = np.array([counts[i] for i in range(4)])
    chi_square = ((observed - n * expected) ** 2 / (n * expected)).sum()
    assert chi_square < 16.3  # p = 0.001 at 3 degrees of freedom


def test_seed_repeats_and_temperature_zero_is_greedy() -> None:
    logits = model_like(8000, 5)
    draws = [[Sampler(SamplingParams(seed=s)).sample(logits) for _ in range(1)] for s in (4, 4)]
    assert draws[0] == draws[1]
    first, second = (Sampler(SamplingParams(seed=9)) for _ in range(2))
    assert [first.sample(logits) for _ in range(20)] == [second.sample(logits) for _ in range(20)]
    assert Sampler(SamplingParams(temperature=0)).sample(logits) == int(logits.argmax())
    greedy = Sampler(SamplingParams(temperature=0, repeat_penalty=100.0))
    assert greedy.sample(logits, [int(logits.argmax())]) == int(np.argsort(-logits)[1])


@pytest.mark.parametrize("top_k", [0, 1, 40])
def test_equal_and_infinite_logits(top_k: int) -> None:
    params = SamplingParams(top_k=top_k, seed=0)
    assert 0 <= Sampler(params).sample(np.zeros(100, np.float32)) < 100
    masked = np.full(100, -np.inf, np.float32)
    masked[42] = 1.0
    assert Sampler(params).sample(masked) == 42


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}, {"repeat_penalty": 0.0}]
)
def test_impossible_parameters_are_named(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SamplingParams(**options)  # type: ignore[arg-type]
