"""The token loop on a real model, against the plain loop it replaces."""

import numpy as np
import pytest

from edgekv.backends.base import Backend
from edgekv.chat.generate import AnswerText, Generator, Step
from edgekv.chat.sampling import Sampler, SamplingParams
from edgekv.errors import BackendError
from edgekv.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def generator(backend: Backend, tokenizer: Tokenizer) -> Generator:
    backend.trim(0)
    return Generator(backend, tokenizer)


def run(generator: Generator, prompt: list[int], **options: object) -> list[Step]:
    return list(generator.generate(prompt, Sampler(GREEDY), **options))  # type: ignore[arg-type]


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


def test_tokens_text_and_timings(generator: Generator, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Once upon a time")
    steps = run(generator, prompt, max_tokens=12)
    generator.backend.trim(0)
    logits = generator.backend.prefill(prompt)
    expected = []
    for _ in range(12):
        expected.append(int(np.argmax(logits)))
        logits = generator.backend.decode(expected[-1])
    assert [step.token for step in steps] == expected
    assert text_of(steps) == tokenizer.decode(expected)
    assert [step.finish for step in steps] == [None] * 11 + ["length"]
    last = steps[-1].timings
    assert (last.n_reused, last.n_prefilled, last.n_generated) == (0, len(prompt), 12)
    assert 0 < last.prefill_s <= last.ttft_s
    assert last.prefill_tps == pytest.approx(len(prompt) / last.prefill_s)
    assert last.decode_tps == pytest.approx(11 / last.decode_s)


def test_a_stop_token_ends_the_text(generator: Generator, tokenizer: Tokenizer) -> None:
    chat = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    steps = run(generator, tokenizer.encode(chat, parse_special=True), max_tokens=60)
    assert steps[-1].finish == "stop"
    assert steps[-1].token in tokenizer.stop_ids
    assert "<|im_end|>" not in text_of(steps)


def test_the_cache_is_reused_up_to_the_first_difference(generator: Generator, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    first = run(generator, prompt, max_tokens=5)
    answer = [step.token for step in first if step.token is not None]
    again = run(generator, prompt + answer, max_tokens=3)
    assert again[0].timings.n_reused == len(prompt) + 4  # the fifth was sampled and never run
    other = prompt[:-3] + tokenizer.encode(" Spain is")
    forked = run(generator, other, max_tokens=5)
    assert forked[0].timings.n_reused == len(prompt) - 3
    same = run(generator, other, max_tokens=5)
    assert (same[0].timings.n_reused, same[0].timings.n_prefilled) == (len(other) - 1, 1)
    generator.backend.trim(0)
    fresh = run(generator, other, max_tokens=5)
    assert fresh[0].timings.n_reused == 0
    assert text_of(fresh) == text_of(forked)


def test_an_abandoned_generation_leaves_the_cache_known(generator: Generator, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Count: one two three")
    whole = run(generator, prompt, max_tokens=8)
    generator.backend.trim(0)
    steps = generator.generate(prompt, Sampler(GREEDY))
    part = [next(steps) for _ in range(4)]
    del steps
    rest = run(generator, prompt + [step.token for step in part if step.token is not None], max_tokens=4)
    assert [s.token for s in part + rest] == [s.token for s in whole]


def test_a_full_cache_ends_it_and_the_text_can_go_on(generator: Generator, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("word " * 120)
    text = AnswerText(tokenizer)
    steps = list(generator.generate(prompt, Sampler(GREEDY), text=text, stop_ids=()))
    assert steps[-1].finish == "context"
    assert generator.backend.n_past == generator.backend.n_ctx
    assert len(steps) == generator.backend.n_ctx - len(prompt) + 1
    with pytest.raises(BackendError, match="do not fit"):
        run(generator, prompt * 3)


def test_interrupt_ends_after_the_token_in_progress(generator: Generator, tokenizer: Tokenizer) -> None:
    steps = generator.generate(tokenizer.encode("Tell me a story."), Sampler(GREEDY), stop_ids=())
    next(steps)
    generator.interrupt()
    rest = list(steps)
    assert [step.finish for step in rest] == ["interrupted"]
    assert run(generator, tokenizer.encode("And"), max_tokens=2)[-1].finish == "length"


def test_same_seed_same_text(generator: Generator, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("My favourite")
    texts = []
    for seed in (7, 7, 8):
        generator.backend.trim(0)
        params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        texts.append(text_of(list(generator.generate(prompt, Sampler(params), max_tokens=12))))
    assert texts[0] == texts[1] != texts[2]


class TestAnswerText:
    """Held-back text, on real tokens of chosen words."""

    def feed(self, tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
        answer = AnswerText(tokenizer, stop)
        pieces = []
        for token in tokenizer.encode(text):
            pieces.append(answer.push(token))
            if answer.stopped:
                return pieces, True
        return [*pieces, answer.finish()], False

    def test_a_stop_string_over_several_tokens_never_shows(self, tokenizer: Tokenizer) -> None:
        pieces, stopped = self.feed(tokenizer, "One two.\n\nUser: three", ["\nUser:"])
        assert ("".join(pieces), stopped) == ("One two.\n", True)

    def test_what_only_began_like_a_stop_string_shows_in_the_end(self, tokenizer: Tokenizer) -> None:
        for text in ("a \nUse", "a \nUseful\nUses", "\nUser"):
            pieces, stopped = self.feed(tokenizer, text, ["\nUser:", "###"])
            assert ("".join(pieces), stopped) == (text, False)

    def test_the_earliest_of_two_wins(self, tokenizer: Tokenizer) -> None:
        pieces, stopped = self.feed(tokenizer, "x STOP y END z", ["END", "STOP"])
        assert ("".join(pieces), stopped) == ("x ", True)

    def test_characters_of_several_tokens_are_whole(self, tokenizer: Tokenizer) -> None:
        pieces, _ = self.feed(tokenizer, "né 你好 🙂‍↔️!", [])
        assert "".join(pieces) == "né 你好 🙂‍↔️!"
        assert "\ufffd" not in "".join(pieces)
