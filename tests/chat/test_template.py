"""Chat templates: the text real ones give, and what hostile ones do not get."""

import ctypes
import resource
import sys
import time
from pathlib import Path

import pytest

from edgekv.chat.template import ChatTemplate
from edgekv.errors import ModelFileError
from edgekv.models.gguf.header import read_header

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, you!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Two\nlines é 你"},
]


def test_a_real_template_gives_what_llama_cpp_gives(smollm2: Path) -> None:
    """llama.cpp has its own C++ rendering of the known templates."""
    from edgekv.backends.llama_cpp.library import llama

    api = llama()
    source = read_header(smollm2).metadata["tokenizer.chat_template"]
    messages = (api.llama_chat_message * len(TALK))(
        *[api.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in TALK]
    )
    buffer = ctypes.create_string_buffer(4096)
    size = api.llama_chat_apply_template(str(source).encode(), messages, len(TALK), True, buffer, 4096)
    assert ChatTemplate(str(source), "<s>", "</s>").render(TALK) == buffer.raw[:size].decode()


def test_tokens_tags_and_functions_that_templates_expect() -> None:
    source = (
        "{{ bos_token }}{% if tools is not none %}TOOLS{% endif %}"
        "{%- for m in messages -%}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{{ eos_token }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
    )
    text = ChatTemplate(source, "<s>", "</s>").render([TALK[3], {"role": "assistant", "content": "é"}])
    assert text == '<s>{"role": "assistant", "content": "é"}</s>4True'


TOJSON = (
    "tojson",
    "tojson(ensure_ascii=False)",
    "tojson(ensure_ascii=True)",
    "tojson(True)",
    "tojson(4)",
    "tojson(False, 2)",
    "tojson(indent=4)",
    "tojson(sort_keys=True, separators=(',', ':'))",
    "tojson(false, none, (',', ':'), true)",
)


@pytest.mark.parametrize("call", TOJSON)
def test_tojson_takes_the_arguments_of_transformers(call: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = "{{ {'é': ['<', 1.5], 'a': none} | " + call + " }}"
    (expected,), _ = render_jinja_template([TALK], chat_template=source)
    assert ChatTemplate(source, "", "").render(TALK) == expected


FAILING = {
    "a dictionary wanted": "{% for k, v in messages[0].content | dictsort %}{{ k }}{% endfor %}",
    "attributes wanted": "{{ messages[0].content | xmlattr }}",
    "hashable values wanted": "{{ messages | unique | list }}",
    "a width wanted": "{{ messages[0].content | wordwrap(0) }}",
    "a sequence wanted": "{{ [] | map('upper') | random }}",
    "an unknown filter": "{{ messages | frobnicate }}",
    "more blocks than Python nests": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
}


@pytest.mark.parametrize("name", FAILING)
def test_whatever_a_template_raises_is_a_line(name: str) -> None:
    with pytest.raises(ModelFileError, match=r"^the chat template ") as failed:
        ChatTemplate(FAILING[name], "", "").render(TALK)
    assert str(failed.value).isprintable()


HOSTILE = {
    "reach into Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reach through a global": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "change the messages": "{{ messages.append(1) }}",
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless generator": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "huge string": "{{ 'a' * 10**10 }}",
    "huge padding": "{{ 'a' | center(10**10) }}",
    "huge format": "{{ '{:>1000000000}'.format(1) }}",
    "doubling string": (
        "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(100) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "huge list text": "{{ ([[1] * 100000] * 100000) | string }}",
    "squaring number": (
        "{% set n = namespace(x=3) %}{% for i in range(9999) %}{% set n.x = n.x * n.x %}{% endfor %}"
    ),
    "huge power": "{{ 9 ** (9 ** 9) }}",
    "huge output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "endless recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too long": "x" * (257 * 1024),
    "syntax": "{% if %}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error_soon_and_small(name: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(HOSTILE[name], "", "", timeout_s=0.5).render(TALK)
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # in KiB
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == before


def test_a_template_may_refuse_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('System role not supported') }}", "", "")
    with pytest.raises(ModelFileError, match="System role not supported"):
        template.render(TALK)


def test_the_words_of_a_refusal_cannot_reach_the_terminal_as_commands() -> None:
    template = ChatTemplate("{{ raise_exception('one\\ntwo \x1b]0;title\x07' ~ 'x' * 9999) }}", "", "")
    with pytest.raises(ModelFileError, match=r"says: one two \?\]0;title\?x+$") as failed:
        template.render(TALK)
    assert len(str(failed.value)) < 600
