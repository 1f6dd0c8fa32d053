"""What reads files that somebody else wrote: for each kind, its sound files, their mutations, and the readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mutators import (
    Mutator,
    mutate_blocks,
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_lines_of_json,
    mutate_own_gguf,
    mutate_safetensors,
    mutate_words,
)
from seeds import TOKENS

from edgekv.cache.rows_file import read_rows_file
from edgekv.chat.packs import read_pack
from edgekv.chat.saved import read_session, require_same_model
from edgekv.chat.template import ChatTemplate
from edgekv.devices.reporting.compare import as_json, as_terminal, load_sources
from edgekv.evaluate.sweep import read_sweep
from edgekv.evaluate.task_formats import read_task
from edgekv.heal.weights import load_healed
from edgekv.models.gguf.parts import read_parts
from edgekv.models.hf.config import read_spec
from edgekv.models.hf.tokenizer_json import read_tokenizer
from edgekv.models.onnx.manifest import check_folder
from edgekv.models.open import open_model
from edgekv.tokenizer.tokenizer import Tokenizer

JINJA = (
    *("{{ ", " }}", "{% ", " %}", "{% endfor %}", "{% endif %}", "{# ", "messages", "message", "m.content", "loop"),
    *("{% for x in range(10**9) %}", "{{ 'a' * 10**9 }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "none"),
    *("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "{{ [0] * 10**9 }}", "{{ 9 ** 9 ** 9 }}"),
    *(" | tojson", " | tojson(indent=10**9)", " | center(10**9)", " | indent(10**8)", " | dictsort", " | items"),
    *(" | batch(10**9) | list", " | slice(10**8) | list", " | wordwrap(1)", " | urlize", " | xmlattr", " | unique"),
    *(" | map('upper') | list", " | selectattr('x') | list", " | groupby('role')", " | sort", " | sum", " | pprint"),
    *("{{ '%999999999d' | format(1) }}", "{{ '{:>999999999}'.format(1) }}", "{{ raise_exception(1) }}", "namespace()"),
    *("{{ strftime_now('%') }}", "{{ strftime_now('%Y' * 10**6) }}", "{% set x = messages %}", "cycler(1)", "joiner"),
    *("{% filter upper %}{% endfilter %}", "{% call m() %}{% endcall %}", "{% do messages.append(1) %}", "{% break %}"),
    *("{% set ns.x = ns %}", "{% generation %}{% endgeneration %}", "\ud800", "\u2028", "'", '"', "-%}", "[0]", "(1)"),
    *("{{ messages.__init__.__globals__ }}", "{{ m.content | attr('__class__') }}", "{{ x ~ x ~ x }}", " is defined"),
)  # fmt: skip
TOML = (
    *("\n", " = ", "[", "]", "[[conversion]]", '"', "'", '"""', "#", ",", "{", "}", "[a.b]", "\\", "\\ud800", "\x00"),
    *("name", "model", "text", "window", "file", "cache_types", "true", "false", "nan", "inf", "-1", "0", "1e400"),
    *("99999999999999999999", "1979-05-27", "0x10", '"q4_0"', '"f16"', "[" * 2000, '["f16", "f16"]', "unknown = 1\n"),
)  # fmt: skip
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
MESSAGES += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "x <|im_end|> \u2028 y"}]


@dataclass(frozen=True)
class Target:
    """One kind of reader.

    Attributes:
        folder: of its sound files, below what `seeds.write_seeds` wrote.
        mutators: what changes each file of the folder, by its name, of which one is picked.
        read: is given the folder with one file changed and the file's name.
    """

    folder: str
    mutators: Mapping[str, Mutator]
    read: Callable[[Path, str], object]


def _read_config(folder: Path, name: str) -> None:
    read_spec((folder / name).parent)


def _open_model(folder: Path, name: str) -> None:
    source = open_model(folder)
    for tensor in source.names()[:2]:
        source.load(tensor)


def _read_tokenizer(folder: Path, name: str) -> None:
    pairs = read_tokenizer(folder, len(TOKENS))
    if "tokenizer.ggml.tokens" in pairs:
        Tokenizer.from_metadata(pairs).encode("hello ab <|im_end|>", True, True)


def _read_sentencepiece(folder: Path, name: str) -> None:
    Tokenizer.from_metadata(read_tokenizer(folder, 300)).encode("the sea <|im_end|>", True, True)


def _read_gguf(folder: Path, name: str) -> None:
    tokenizer = Tokenizer.from_metadata(read_parts(folder / name).metadata)
    tokenizer.decode(tokenizer.encode("hello ab <|im_end|>", True, True), True)
    source = open_model(folder / name)
    for tensor in source.names()[:3]:
        source.load(tensor)


def _render(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    ChatTemplate(text, "<s>", "</s>", timeout_s=0.5).render(MESSAGES)


def _compare(folder: Path, name: str) -> None:
    sources = load_sources([folder / name])
    as_terminal(sources)
    as_json(sources)


def _read_task(folder: Path, name: str) -> None:
    read_task(name.partition(".")[0], folder / name, None)


def _read_healed(folder: Path, name: str) -> None:
    load_healed(folder / name, open_model(folder / "model.gguf"))


def _open_own(folder: Path, name: str) -> None:
    source = open_model(folder / name)
    for tensor in source.names()[:3]:
        source.load(tensor)


def _read_session(folder: Path, name: str) -> None:
    saved = read_session(folder / name)
    assert saved is not None
    require_same_model(
        folder / name, saved.stored.header, saved.stored.header.model, saved.stored.header.layout
    )
    saved.stored.rows()


def _read_pack(folder: Path, name: str) -> None:
    pack = read_pack(folder / name)
    pack.stored.rows()


def _read_kept(folder: Path, name: str) -> None:
    """As a server does: tokens alone at its start, rows when a prompt begins with them."""
    tokens = read_rows_file(folder / name, "edgekv.prefix", check_rows=False).tokens
    stored = read_rows_file(folder / name, "edgekv.prefix")
    assert stored.end is None or stored.tokens == tokens
    stored.rows(len(stored.tokens) // 2)


CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SHARDS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
TARGETS: Mapping[str, Target] = {
    "config": Target("config", {
        f"{name}/{CONFIG}": mutate_json for name in ("llama", "qwen3", "phi3", "gemma3", "deepseek_v3", "smollm3")
    }, _read_config),
    "checkpoint": Target("hf", {
        CONFIG: mutate_json, "model.safetensors.index.json": mutate_json,
        **dict.fromkeys(SHARDS, mutate_safetensors)}, _open_model),
    "tokenizer": Target("hf", dict.fromkeys(TOKENIZER, mutate_json), _read_tokenizer),
    "sentencepiece": Target("sentencepiece", {
        "tokenizer.model": mutate_bytes, "added_tokens.json": mutate_json}, _read_sentencepiece),
    "gguf": Target("gguf", {"model.gguf": mutate_gguf}, _read_gguf),
    "template": Target("template", {"template.jinja": mutate_words(JINJA)}, _render),
    "llama-bench": Target("reports", {
        "llama-bench.json": mutate_json, "llama-bench.jsonl": mutate_lines_of_json}, _compare),
    "report": Target("reports", {"edgekv.json": mutate_json}, _compare),
    "task": Target("tasks", dict.fromkeys(("winogrande.jsonl", "lambada.jsonl"), mutate_lines_of_json), _read_task),
    "sweep": Target("sweep", {"sweep.toml": mutate_words(TOML)}, lambda folder, name: read_sweep(folder / name)),
    "onnx": Target("onnx", {"edgekv.json": mutate_json, "model.onnx": mutate_bytes},
                   lambda folder, name: check_folder(folder)),
    "own": Target("own", {"model.edgekv": mutate_own_gguf}, _open_own),
    "session": Target("sessions", {"a.session": mutate_blocks}, _read_session),
    "kept": Target("sessions", {"a.prefix": mutate_blocks}, _read_kept),
    "pack": Target("sessions", {"a.pack": mutate_blocks}, _read_pack),
    "healed": Target("healed", {"healed.safetensors": mutate_safetensors}, _read_healed),
}  # fmt: skip
