"""Statistics of one layer over all windows, against those of all tokens at once, and the step to the next layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgekv.cache.store import KVCache
from edgekv.convert.methods import complex_joint
from edgekv.convert.one_window import attention_view, query_rows
from edgekv.convert.output_fit import HELD_OUT
from edgekv.convert.statistics import MAX_PROBES, FitRecipe, Job, advance, mix, observe, without_biases
from edgekv.convert.target import target_spec
from edgekv.convert.workers import Workers, workers
from edgekv.reference.attention import gqa_attention
from edgekv.reference.model import block_forward, load_block
from edgekv.reference.ops import rms_norm
from edgekv.source import LazySource
from edgekv.spec import GQA

N, T = 11, 24  # windows: no multiple of the workers


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., LazySource]) -> LazySource:
    return make_llama()


@pytest.fixture(scope="module")
def states(source: LazySource) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, source.spec.vocab, (N, T))
    return source.load("token_embd.weight")[tokens]


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    with workers() as crew:
        yield crew


def job_of(source: LazySource, crew: Workers, n_windows: int = N, n_elsewhere: int = 0) -> Job:
    gqa = source.spec.layers[0].attention
    assert isinstance(gqa, GQA)
    target = target_spec(gqa, 32, 16, 16, 32)
    return Job(source.spec, gqa, target, FitRecipe(), n_windows, n_elsewhere, crew)


def test_a_fifth_of_the_windows_is_held_out_and_judged(source: LazySource, crew: Workers) -> None:
    job = job_of(source, crew)
    assert (job.n_fitted, job.judged) == (9, range(9, 11))
    assert job_of(source, crew, 2).judged == range(2), "with none held out all are judged"
    many = job_of(source, crew, 100)
    assert many.probed == {*range(13), *range(80, 83)}
    assert len(many.probed) == MAX_PROBES
    assert len(many.judged) == round(100 * HELD_OUT)


def test_what_is_observed_is_what_all_tokens_at_once_give(
    source: LazySource, states: np.ndarray, crew: Workers
) -> None:
    w, job = load_block(source, 0), job_of(source, crew)
    before = states.copy()
    seen, views = observe(w, job, states)
    np.testing.assert_array_equal(states, before)
    inputs = rms_norm(states, w["attn_norm.weight"], source.spec.norm_eps)
    flat = inputs.reshape(-1, 64).astype(np.float64)
    np.testing.assert_allclose(seen.stats.covariance, flat.T @ flat / len(flat), atol=1e-5)
    outputs = np.stack(
        [gqa_attention(x, w, job.gqa, KVCache(source.spec, T), 0).astype(np.float64) for x in inputs]
    )
    np.testing.assert_allclose(seen.mixed @ w["attn_output.weight"].T, outputs, atol=1e-4)
    np.testing.assert_allclose(seen.queries.reshape(N, T, -1), inputs @ w["attn_q.weight"].T, atol=1e-4)
    judged = np.square(outputs[9:]).sum()
    assert seen.energy == pytest.approx(judged, rel=1e-4)
    assert seen.stats.output_scale == pytest.approx(np.sqrt(judged / (2 * T) / job.gqa.n_heads), rel=1e-4)

    attended = np.zeros((64, 64))
    for i in job.probed:
        for head in views[i].attention.astype(np.float64):
            rows = head @ inputs[i]
            attended += rows.T @ rows / T / job.gqa.n_heads / len(job.probed)
    np.testing.assert_allclose(seen.stats.mixed_covariance, attended, atol=1e-4)


def test_only_probed_windows_are_viewed(source: LazySource, states: np.ndarray, crew: Workers) -> None:
    w, many = load_block(source, 0), np.concatenate([states, states[:9] * 0.5])
    job = job_of(source, crew, len(many))
    _, views = observe(w, job, many)
    assert set(views) == job.probed != set(range(20))
    for i in (0, 12, 18):
        expected = attention_view(job.inputs(w, many[i]), w, job.gqa)
        np.testing.assert_array_equal(views[i].attention, expected.attention)


def test_text_of_other_kinds_is_judged_and_viewed_but_in_no_statistic(
    source: LazySource, states: np.ndarray, crew: Workers
) -> None:
    w, alone, job = load_block(source, 0), job_of(source, crew, 8), job_of(source, crew, 8, 3)
    expected, _ = observe(w, alone, states[:8])
    seen, views = observe(w, job, states)
    for name in ("covariance", "mixed_covariance"):
        np.testing.assert_allclose(getattr(seen.stats, name), getattr(expected.stats, name), rtol=1e-5)
    assert seen.energy == pytest.approx(expected.energy, rel=1e-5)
    outputs = (seen.mixed[8:] @ w["attn_output.weight"].T).astype(np.float64)
    assert seen.energy_elsewhere == pytest.approx(np.square(outputs).sum(), rel=1e-4)
    assert job.probed == alone.probed | {8, 9, 10} == set(views)
    maps = complex_joint(w, seen.stats, job.gqa, job.target)
    q = query_rows(maps.query_map, w["attn_q.weight"].reshape(4, 32, 64), seen.stats.covariance, job.target)
    latents, fitted, held_out, elsewhere = mix(w, job, states, maps, q, seen)
    assert [part.n_tokens for part in (fitted, held_out, elsewhere)] == [6 * T, 2 * T, 3 * T]
    features = latents[8:].reshape(-1, 128).astype(np.float64)
    np.testing.assert_allclose(elsewhere.gram, features.T @ features, rtol=1e-3, atol=1e-2)


def test_moments_are_sums_over_the_fitted_and_the_held_out_windows(
    source: LazySource, states: np.ndarray, crew: Workers
) -> None:
    w, job = load_block(source, 0), job_of(source, crew)
    seen, _ = observe(w, job, states)
    maps = complex_joint(w, seen.stats, job.gqa, job.target)
    q = query_rows(maps.query_map, w["attn_q.weight"].reshape(4, 32, 64), seen.stats.covariance, job.target)
    latents, fitted, held_out, elsewhere = mix(w, job, states, maps, q, seen)
    assert elsewhere.n_tokens == 0
    assert latents.shape == (N, T, 4 * 32)
    for moments, part in ((fitted, slice(0, 9)), (held_out, slice(9, 11))):
        features = latents[part].reshape(-1, 128).astype(np.float64)
        targets = (seen.mixed[part] @ w["attn_output.weight"].T).reshape(-1, 64)
        np.testing.assert_allclose(moments.gram, features.T @ features, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(moments.cross, features.T @ targets, rtol=1e-3, atol=1e-2)
        assert moments.n_tokens == len(features)


def test_advancing_with_the_originals_mix_is_the_reference_block(
    source: LazySource, states: np.ndarray, crew: Workers
) -> None:
    w, job = load_block(source, 0), job_of(source, crew)
    own = states.copy()
    seen, _ = observe(w, job, own)
    behind = advance(w, job, own, seen.mixed, w["attn_output.weight"].T)
    assert behind is own, "the states exist once"
    expected = [block_forward(x, w, source.spec, 0, KVCache(source.spec, T)) for x in states]
    np.testing.assert_allclose(behind, np.stack(expected), atol=1e-3)


def test_biases_are_folded_by_the_inputs_of_all_windows(
    make_llama: Callable[..., LazySource], states: np.ndarray, crew: Workers
) -> None:
    """A direction that every token has carries them: the layer without biases gives what it gave with them."""
    source = make_llama(bias=True)
    w, job = load_block(source, 0), job_of(source, crew)
    constant = states.copy()
    constant[..., 0] = 40.0
    folded, error = without_biases(w, job, constant)
    assert error < 0.01
    assert not [name for name in folded if name.endswith(".bias")]
    inputs = job.inputs(w, constant[0])
    for kind in ("q", "v"):
        with_bias = inputs @ w[f"attn_{kind}.weight"].T + w[f"attn_{kind}.bias"]
        np.testing.assert_allclose(inputs @ folded[f"attn_{kind}.weight"].T, with_bias, atol=0.02)
    _, worse = without_biases(w, job, states)
    assert worse > 10 * error
