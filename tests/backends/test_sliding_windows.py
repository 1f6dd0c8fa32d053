"""A cache that forgets what lies outside a window: its bytes, and the same logits as the reference after every trim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.base import Interrupted
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.llama_cpp.footprint import cache_nbytes
from edgekv.backends.llama_cpp.library import LOG
from edgekv.backends.reference import ReferenceBackend
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.reference.ops import kl_rows, log_softmax
from edgekv.source import LazySource
from edgekv.spec import LayerSpec

WINDOW = 64
CELLS = 768  # of layers with the window: 64 + 512 of a micro-batch, in blocks of 256
LENGTH = 900
TOKENS = np.random.default_rng(5).integers(0, 256, 1100).tolist()
OLDEST = LENGTH - CELLS  # position in the cells of a window after LENGTH tokens
EDGE = OLDEST + WINDOW - 1  # whose token sees OLDEST
NEAR = 1e-4  # nats: llama.cpp attends in float16


def write(source: LazySource, folder: Path) -> Path:
    path = folder / f"{source.spec.arch}.gguf"
    write_gguf(source, path, "f32", {}, False, lambda *_: None)
    return path


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def gemma(
    request: pytest.FixtureRequest,
    make_gemma: Callable[[str, int], LazySource],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return write(make_gemma(request.param, WINDOW), tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="module")
def wanted(gemma: Path) -> np.ndarray:
    """The reference's logits for TOKENS."""
    return np.asarray(ReferenceBackend(open_model(gemma), len(TOKENS)).prefill_all(TOKENS))


@pytest.fixture
def engine(gemma: Path) -> Iterator[LlamaCppBackend]:
    engine = LlamaCppBackend(gemma, n_ctx=2048, cache_type="f32", n_threads=1)
    yield engine
    engine.close()


def kl(given: np.ndarray, wanted: np.ndarray) -> float:
    """The largest KL of any position, in nats."""
    return float(kl_rows(log_softmax(wanted), log_softmax(given)).max())


def run_on(engine: LlamaCppBackend | IsolatedBackend, stop: int) -> np.ndarray:
    """Run TOKENS up to `stop`; logits of the last 20, of which the last five are decoded one by one."""
    engine.prefill(TOKENS[engine.n_past : stop - 20])
    every = engine.prefill_all(TOKENS[stop - 20 : stop - 5])
    return np.concatenate([every, [engine.decode(token) for token in TOKENS[stop - 5 : stop]]])


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("n_ctx", [256, 600, 2048])
def test_the_cache_takes_what_the_arithmetic_says(gemma: Path, n_ctx: int, cache_type: str) -> None:
    engine = LlamaCppBackend(gemma, n_ctx=n_ctx, cache_type=cache_type, n_threads=1)
    spec = open_model(gemma).spec
    assert engine.cache_nbytes() == cache_nbytes(spec, cache_type, n_ctx, engine.n_ubatch)
    cells = {256: 256 * 3, 600: 768 * 3, 2048: 2048 + 2 * CELLS}[n_ctx]
    assert engine.cache_nbytes() == cells * spec.layers[0].attention.kv_bytes_per_token(cache_type)
    assert abs(LOG.cache_nbytes() - engine.cache_nbytes()) <= 0.01 * 2**20
    engine.close()


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_window_that_llama_cpp_does_not_know_costs_all_of_the_context(
    make_llama: Callable[..., LazySource], tmp_path: Path, arch: str
) -> None:
    """Mistral and Phi-3: their graphs attend to all tokens."""
    base = make_llama(head_dim=16, window=WINDOW)
    attention = base.spec.layers[0].attention
    half = replace(
        attention, rope=replace(attention.rope, layout="half" if arch == "phi3" else "interleaved")
    )
    spec = replace(base.spec, arch=arch, layers=(LayerSpec(half, 96),) * 3)
    source = LazySource(spec, base.metadata)
    for name in base.names():
        source.add_array(name, base.load(name))
    path = write(source, tmp_path)
    engine = LlamaCppBackend(path, n_ctx=1024, n_threads=1)
    assert (
        engine.cache_nbytes() == cache_nbytes(spec, "f16", 1024, 512) == 1024 * spec.kv_bytes_per_token("f16")
    )
    engine.prefill(TOKENS[:900])
    engine.trim(3)
    assert engine.n_past == 3
    engine.close()


def test_logits_are_the_references(engine: LlamaCppBackend, wanted: np.ndarray) -> None:
    assert kl(engine.prefill_all(TOKENS), wanted) < NEAR


@pytest.mark.parametrize("back_to", [LENGTH - 1, LENGTH - 30, LENGTH - 400, EDGE, EDGE - 1, 100, 1, 0])
def test_a_trim_keeps_all_that_is_seen_or_nothing(
    engine: LlamaCppBackend, wanted: np.ndarray, back_to: int
) -> None:
    engine.prefill(TOKENS[:LENGTH])
    engine.trim(back_to)
    assert engine.n_past == (back_to if back_to >= EDGE else 0)
    stop = back_to + 60
    assert kl(run_on(engine, stop), wanted[stop - 20 : stop]) < NEAR


def test_many_trims_in_a_row(engine: LlamaCppBackend, wanted: np.ndarray) -> None:
    """Freed cells are filled in another order, which must not hide what was let go."""
    rng = np.random.default_rng(0)
    emptied = 0
    for _ in range(40):
        stop = int(rng.integers(max(engine.n_past, 40) + 25, len(TOKENS)))
        assert kl(run_on(engine, stop), wanted[stop - 20 : stop]) < NEAR
        back_to = int(rng.integers(20, engine.n_past - 20))
        engine.trim(back_to)
        assert engine.n_past in (back_to, 0)
        emptied += engine.n_past == 0
    assert 0 < emptied < 40


def test_an_interrupted_prefill_goes_on(gemma: Path, wanted: np.ndarray) -> None:
    import ctypes

    flag = ctypes.create_string_buffer(2)
    engine = LlamaCppBackend(gemma, n_ctx=2048, cache_type="f32", n_threads=1, abort_flag=flag)
    engine.prefill(TOKENS[:LENGTH])
    flag[0] = b"\1"
    with pytest.raises(Interrupted):
        engine.prefill(TOKENS[LENGTH:])
    assert engine.n_past == LENGTH
    assert kl(engine.prefill(TOKENS[LENGTH:])[None], wanted[-1:]) < NEAR
    engine.close()


def test_an_engine_in_a_child_says_what_is_left(tiny_gemma: Path) -> None:
    with_window = IsolatedBackend(tiny_gemma, n_ctx=2048, n_threads=1)
    with_window.prefill(TOKENS[:LENGTH])
    with_window.trim(LENGTH - 10)
    assert with_window.n_past == LENGTH - 10
    with_window.trim(50)
    assert with_window.n_past == 0
    fresh = with_window.prefill(TOKENS[:60])
    with_window.trim(0)
    np.testing.assert_array_equal(with_window.prefill(TOKENS[:60]), fresh)
    with_window.close()
