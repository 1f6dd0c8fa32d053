"""The llama.cpp backend against a bare loop over llama_decode, on a real model."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.backends.base import Interrupted
from edgekv.backends.llama_cpp.backend import LOGITS_ROWS, LlamaCppBackend
from edgekv.backends.llama_cpp.library import LOG, llama, repacking_is_safe
from edgekv.errors import BackendError, InputError, ModelFileError
from edgekv.export.gguf.write import write_gguf
from edgekv.models.gguf.source import GGUFSource
from edgekv.progress import ignore
from edgekv.quant.formats import CACHE_TYPES, FORMATS
from edgekv.reference.ops import kl_rows, log_softmax
from edgekv.source import Array, LazySource
from edgekv.spec import GQA

TEXT = [1, 4093, 198, 504, 2120, 282, 253, 1165, 2391, 3542, 314, 1343, 28, 284, 357, 314, 6104, 30]


@pytest.fixture(scope="module")
def wide_heads(make_llama: Callable[..., LazySource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads of 256 hold the blocks of every format."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write_gguf(make_llama(head_dim=256), path, "f32", {}, False, ignore)
    return path


@pytest.fixture
def backend(smollm2: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(smollm2, n_ctx=512, n_threads=1)
    yield backend
    backend.close()


def bare_greedy(path: Path, tokens: list[int], steps: int) -> tuple[list[int], Array]:
    """The shortest loop over llama.cpp's own functions; the tokens, and the last logits (vocab,)."""
    api = llama()
    model_params = api.llama_model_default_params()
    model_params.use_extra_bufts = repacking_is_safe()
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch, params.flash_attn_type = 512, 1, 1, 1
    context = api.llama_init_from_model(model, params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    out: list[int] = []
    feed = tokens
    for _ in range(steps):
        ids = (ctypes.c_int32 * len(feed))(*feed)
        assert api.llama_decode(context, api.llama_batch_get_one(ids, len(feed))) == 0
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
        out.append(int(logits.argmax()))
        feed = out[-1:]
    api.llama_free(context)
    api.llama_model_free(model)
    return out, logits


def test_greedy_equals_a_bare_loop(smollm2: Path, backend: LlamaCppBackend) -> None:
    expected, last = bare_greedy(smollm2, TEXT, 24)
    logits = backend.prefill(TEXT)
    out = [int(logits.argmax())]
    while len(out) < 24:
        logits = backend.decode(out[-1])
        out.append(int(logits.argmax()))
    assert out == expected
    np.testing.assert_array_equal(logits, last)
    assert backend.n_past == len(TEXT) + 23


def test_prefill_all_agrees_with_prefill(smollm2: Path) -> None:
    """With a bf16 cache, attention runs the same kernel for every batch size, so the logits are the same."""
    backend = LlamaCppBackend(smollm2, n_ctx=512, n_threads=1, cache_type="bf16")
    long = (TEXT * 20)[: LOGITS_ROWS + 10]
    every = backend.prefill_all(long)
    assert every.shape == (len(long), backend.n_vocab)
    for n in (3, LOGITS_ROWS + 1):
        backend.trim(0)
        np.testing.assert_allclose(backend.prefill(long[:n]), every[n - 1], atol=1e-3)
    backend.close()


def test_trim_goes_back_in_time(backend: LlamaCppBackend) -> None:
    backend.prefill(TEXT)
    first = backend.decode(28)
    backend.decode(99)
    backend.trim(len(TEXT))
    assert backend.n_past == len(TEXT)
    np.testing.assert_array_equal(backend.decode(28), first)


PAIRS = ("q8_0/q4_0", "q5_0/q4_0", "q4_0/q8_0", "f16/q4_0", "q4_0/f32", "mxfp4/iq4_nl")


@pytest.mark.parametrize("cache_type", [*CACHE_TYPES, *PAIRS])
def test_cache_nbytes_is_the_arithmetic_and_the_log(smollm2: Path, wide_heads: Path, cache_type: str) -> None:
    """What llama.cpp allocated, what it says of each side, and what spec.py computes."""
    names = cache_type.split("/")
    path = smollm2 if all(FORMATS[name].block <= 64 for name in names) else wide_heads
    source = GGUFSource(path)
    backend = LlamaCppBackend(path, n_ctx=300, cache_type=cache_type, n_threads=1)
    assert backend.n_ctx == 512  # rounded up to a multiple of 256
    attention = source.spec.layers[0].attention
    assert isinstance(attention, GQA)
    values = attention.n_kv_heads * attention.head_dim * source.spec.n_layers * 512
    sides = (("K", names[0]), ("V", names[-1]))
    assert backend.cache_nbytes() == sum(FORMATS[name].nbytes(values) for _, name in sides)
    assert backend.cache_nbytes() == source.spec.kv_bytes_per_token(cache_type) * 512
    assert abs(LOG.cache_nbytes() - backend.cache_nbytes()) <= 0.005 * 2**20
    for side, name in sides:
        said = f"{side} ({name}): {FORMATS[name].nbytes(values) / 2**20:7.2f} MiB"
        assert said.lower() in LOG.text().lower()
    assert np.isfinite(backend.prefill([1, 2, 3])).all()
    backend.close()


def test_every_cache_type_predicts_what_f16_does(wide_heads: Path) -> None:
    """On each side, at most twice what q4_0 loses: a format without a kernel gives noise or kills the process."""
    tokens = np.random.default_rng(0).integers(0, 250, 128).tolist()

    def log_probs(cache_type: str) -> Array:
        backend = LlamaCppBackend(wide_heads, n_ctx=256, cache_type=cache_type, n_threads=1)
        logits = backend.prefill_all(tokens)
        backend.close()
        return log_softmax(logits)

    exact = log_probs("f16")
    for side in ("{}/f16", "f16/{}"):
        lost = {name: kl_rows(exact, log_probs(side.format(name))).mean() for name in CACHE_TYPES}
        assert max(lost.values()) < 2.2 * lost["q4_0"], lost
        assert lost["q8_0"] < lost["q5_1"] < lost["q4_1"]


@pytest.mark.parametrize("cache_type", ["q8_0/q4_0", "f16/q8_0"])
def test_a_latent_has_no_k_and_v(tiny_mla: Path, cache_type: str) -> None:
    k, v = cache_type.split("/")
    said = f"{cache_type}: a latent .* one row per token .* cannot differ; take {k} or {v}"
    with pytest.raises(InputError, match=said):
        LlamaCppBackend(tiny_mla, cache_type=cache_type)
    backend = LlamaCppBackend(tiny_mla, n_ctx=256, cache_type="q8_0/q8_0", n_threads=1)
    assert backend.cache_nbytes() == 256 * GGUFSource(tiny_mla).spec.kv_bytes_per_token("q8_0")
    backend.close()


def test_a_full_cache_is_an_error_and_changes_nothing(backend: LlamaCppBackend) -> None:
    backend.prefill((TEXT * 30)[:510])
    with pytest.raises(BackendError, match="510 of 512 tokens and 3 more do not fit"):
        backend.prefill([1, 2, 3])
    assert backend.n_past == 510
    backend.prefill([1, 2])
    with pytest.raises(BackendError, match="do not fit"):
        backend.decode(1)


def test_a_token_outside_the_vocabulary_is_an_error_with_the_engines_words(backend: LlamaCppBackend) -> None:
    expected = backend.prefill(TEXT)
    with pytest.raises(BackendError, match="invalid token"):
        backend.prefill([5, 49152])
    assert backend.n_past == len(TEXT)
    backend.trim(0)
    np.testing.assert_array_equal(backend.prefill(TEXT), expected)


def test_the_abort_flag_ends_a_long_prefill(smollm2: Path) -> None:
    flag = ctypes.create_string_buffer(2)
    backend = LlamaCppBackend(smollm2, n_ctx=8192, n_threads=1, abort_flag=flag)
    timer = threading.Timer(0.3, flag.__setitem__, (0, b"\1"))
    started = time.perf_counter()
    timer.start()
    with pytest.raises(Interrupted):
        backend.prefill((TEXT * 400)[:7000])
    assert time.perf_counter() - started < 5
    assert backend.n_past % backend.n_ubatch == 0
    backend.trim(0)
    assert backend.prefill(TEXT).shape == (backend.n_vocab,)
    backend.close()


def test_a_refusal_of_the_engine_is_quoted(tmp_path: Path) -> None:
    """A well-formed GGUF without a single tensor."""
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BackendError, match=r"could not load .*empty\.gguf: .*key not found in model"):
        LlamaCppBackend(tmp_path / "empty.gguf")


def test_a_malformed_file_never_reaches_the_engine(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelFileError):
        LlamaCppBackend(tmp_path / "bad.gguf")


def test_a_cache_type_that_the_head_size_forbids_is_an_input_error(
    make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    """Heads of 16 dims do not hold q8_0's blocks of 32."""
    path = tmp_path / "narrow.gguf"
    write_gguf(make_llama(head_dim=16), path, "f32", {}, False, ignore)
    backend = LlamaCppBackend(path, cache_type="f16", n_threads=1)
    assert backend.prefill([1, 2, 3]).shape == (backend.n_vocab,)
    backend.close()
    for cache_type, said in (("q8_0", "K cache type q8_0"), ("f16/q4_0", "V cache type q4_0")):
        with pytest.raises(InputError, match=rf"{said} .*does not divide n_embd_head_.=16; f16 always works"):
            LlamaCppBackend(path, cache_type=cache_type)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_type": "q3_0"}, "unknown cache type 'q3_0'"),
        ({"cache_type": "q8_0/q3_0"}, "unknown cache type 'q3_0'"),
        ({"cache_type": "q6_k"}, "K cache type q6_K with block size 256 does not divide n_embd_head_k=64"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"n_threads": -1}, "n_threads is -1"),
    ],
)
def test_impossible_options(smollm2: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LlamaCppBackend(smollm2, **options)  # type: ignore[arg-type]


def test_repacking_is_off_only_on_amx(tmp_path: Path) -> None:
    for i, (flags, safe) in enumerate([("fpu amx_bf16 amx_tile amx_int8", False), ("fpu avx512f", True)]):
        path = tmp_path / f"{i}/proc/cpuinfo"
        path.parent.mkdir(parents=True)
        path.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 1\n")
        assert repacking_is_safe(tmp_path / str(i)) is safe
    assert repacking_is_safe(tmp_path / "none")


def test_the_log_is_taken_again_from_the_package(smollm2: Path) -> None:
    """The package llama_cpp takes the log when it is imported; what is cached, and how, is read off it."""
    import llama_cpp._logger

    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    backend = LlamaCppBackend(smollm2, n_ctx=512, cache_type="q8_0", n_threads=1)
    assert LOG.cache_nbytes() > 0
    backend.close()
