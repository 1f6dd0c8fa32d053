"""Documents in prompts: their tokens stand whole at the beginning of the system message."""

from __future__ import annotations

import pytest

from edgekv.chat.session import DOCUMENTS, PromptFormat, Turn
from edgekv.chat.template import ChatTemplate
from edgekv.errors import ModelFileError
from edgekv.tokenizer.tokenizer import Tokenizer

TEXT = "The sea is wet <|im_end|>.\n\n"


def spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(token) for token in tokens).decode()


@pytest.mark.parametrize("system", ["", "Be brief.", "\n\n<|im_start|>"])
@pytest.mark.parametrize("turns", [[], [Turn("Who?", "You."), Turn(DOCUMENTS, f"{DOCUMENTS}!")]])
def test_the_prompt_is_the_one_with_their_text(tokenizer: Tokenizer, system: str, turns: list[Turn]) -> None:
    form = PromptFormat.of_model(tokenizer)
    form.documents = tokenizer.encode(TEXT)
    before = form.before_documents()
    assert spelled(tokenizer, before) == "<|im_start|>system\n"
    tokens = form.tokens(system, turns, f"Which {DOCUMENTS}?")
    assert tokens[: len(before) + len(form.documents)] == [*before, *form.documents]
    plain = PromptFormat.of_model(tokenizer).tokens(TEXT + system, turns, f"Which {DOCUMENTS}?")
    assert spelled(tokenizer, tokens) == spelled(tokenizer, plain)


def test_without_a_template_they_stand_first(tokenizer: Tokenizer) -> None:
    form = PromptFormat(tokenizer, None)
    form.documents = tokenizer.encode(TEXT)
    assert form.before_documents() == []
    assert form.tokens("a", [], "b") == [*form.documents, *tokenizer.encode("ab")]


def test_a_template_that_drops_the_system_message_is_refused(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    form = PromptFormat(tokenizer, ChatTemplate(template, "", ""), "model.gguf")
    with pytest.raises(
        ModelFileError, match=r"model\.gguf: the chat template has no place for documents.*; leave"
    ):
        form.before_documents()
