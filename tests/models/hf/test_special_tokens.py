"""Added tokens, ends of text and chat templates of a folder: transformers' own, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.export.gguf.write import write_gguf
from edgekv.models.hf.source import HFSource
from edgekv.models.hf.tokenizer_json import read_tokenizer
from edgekv.tokenizer.tokenizer import Tokenizer

from .conftest import QWEN2, Zoo, byte_level
from .test_tokenizer import sentencepiece

PLAIN: dict[str, Any] = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
TEXT = "<|im_start|>user\nHi <tool>  there<|im_end|>\n\n <|im_start|>\tassistant\n"


def write(folder: Path, tokens: list[AddedToken] | None = None, **config: object) -> Path:
    tokenizer = byte_level(QWEN2)
    for token in tokens or []:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config)
    )
    return folder


def swallowing(names: list[str]) -> list[AddedToken]:
    return [AddedToken(name, rstrip=True, special=name != "<tool>", normalized=False) for name in names]


PHI = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "<|endoftext|>")]
ALL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<tool>", "</s>"]


@pytest.mark.parametrize("name", ["Phi-3-mini", "my-finetune", "0a67737cc96d2554"])
@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("tokens", [[], ALL])
def test_white_space_behind_control_tokens(tokens: list[str], place: str, name: str, tmp_path: Path) -> None:
    """Under every folder's name, and where the rule stands in either file."""
    from transformers import AutoTokenizer

    if place == "tokenizer.json":
        folder = write(tmp_path / name, [*PHI, *swallowing(tokens)])
    else:
        full = byte_level(QWEN2)
        full.add_special_tokens([*PHI, AddedToken("</s>", special=True)])
        entries = {
            str(full.token_to_id(text)): PLAIN
            | {"content": text, "rstrip": True, "special": text != "<tool>"}
            for text in tokens
        }
        folder = write(tmp_path / name, PHI, added_tokens_decoder=entries)
    pairs: dict[str, Any] = {"general.name": name} | read_tokenizer(folder, 420)
    wanted = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    assert Tokenizer.from_metadata(pairs).encode(TEXT, parse_special=True) == wanted


def test_llama_cpp_swallows_the_same_white_space(zoo: Zoo, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo.folder("qwen2"), tmp_path / "my-finetune"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"rstrip": false', '"rstrip": true'))
    with pytest.raises(
        UnsupportedError, match=r"\(rstrip\)"
    ):  # no model of that name without Phi-3's own tokens
        dict(HFSource(folder).metadata)
    tokenizer = HFTokenizer.from_file(str(path))
    tokenizer.add_special_tokens([*PHI, *swallowing(["</s>"])])
    tokenizer.save(str(path))
    out = tmp_path / "x.gguf"
    write_gguf(HFSource(folder), out, "f32", {}, False, lambda *_: None)
    engine = LlamaCppBackend(out, n_ctx=32, cache_type="f16", n_threads=1)
    try:
        given = engine.language().encode(TEXT, parse_special=True)
    finally:
        engine.close()
    assert given == tokenizer.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("rule", "phrase"),
    [("lstrip", "before it"), ("single_word", "stands alone"), ("rstrip", r"behind them \(rstrip\)")],
)
@pytest.mark.parametrize("special", [True, False])
def test_rules_that_llama_cpp_does_not_have(rule: str, phrase: str, special: bool, tmp_path: Path) -> None:
    token = AddedToken("<x>", special=special, **PLAIN | {rule: True})
    with pytest.raises(UnsupportedError, match=rf"{phrase}.*; choose a model without"):
        read_tokenizer(write(tmp_path / "a", [token]), 420)
    entries = {"404": PLAIN | {"content": "<x>", "special": special, rule: True}}
    with pytest.raises(UnsupportedError, match=phrase):
        read_tokenizer(write(tmp_path / "b", added_tokens_decoder=entries), 420)


def test_tokens_of_the_config_alone(tmp_path: Path) -> None:
    entries = {"404": PLAIN | {"content": "<x>", "special": True, "__type": "AddedToken"}}
    pairs = read_tokenizer(write(tmp_path, added_tokens_decoder=entries), 420)
    assert Tokenizer.from_metadata(pairs).encode("<x>", parse_special=True) == [404]
    for broken in ({"404": {}}, {"x": {"content": "<x>"}}, [1], {"404": {"content": "<x>", "rstrip": 3}}):
        with pytest.raises(ModelFileError, match="added_tokens_decoder cannot be read"):
            read_tokenizer(write(tmp_path, added_tokens_decoder=broken), 420)


def test_tokens_that_are_looked_for_in_normalized_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix=True)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"'<tool>' is looked for in normalized text"):
        read_tokenizer(tmp_path, tokenizer.get_vocab_size())


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 7}, {}, {7}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8}),
        (None, {"eos_token_id": 7}, {7}),
        (None, {"eos_token_id": [7, 8]}, {7, 8}),
        ({"temperature": 1.0}, {"eos_token_id": 7}, {7}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [7]}}, {7}),
        ({"eos_token_id": 100_000}, {}, set()),
        ({"eos_token_id": -1}, {}, set()),
        (None, {}, set()),
    ],
)
@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_ends_of_text(
    eos: str | None, generation: dict[str, Any] | None, config: dict[str, Any], ends: set[int], tmp_path: Path
) -> None:
    write(tmp_path, eos_token=eos)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    stops = Tokenizer.from_metadata(read_tokenizer(tmp_path, 420)).stop_ids
    im_end = byte_level(QWEN2).token_to_id("<|im_end|>")
    assert ends | {im_end} <= stops
    if eos:
        assert stops == ends | {im_end}


def test_more_ends_than_a_gguf_has_keys_for(tmp_path: Path) -> None:
    path = write(tmp_path) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 6, 7]}))
    with pytest.raises(UnsupportedError, match=r"would not stop at token 7; leave"):
        read_tokenizer(tmp_path, 420)
    for broken in ("x", 1.5, [None], True):
        path.write_text(json.dumps({"eos_token_id": broken}))
        with pytest.raises(ModelFileError, match="a token's number or a list of them was expected"):
            read_tokenizer(tmp_path, 420)
    path.write_text("{")
    with pytest.raises(ModelFileError, match=r"generation_config.json: cannot be read as JSON"):
        read_tokenizer(tmp_path, 420)


@pytest.mark.parametrize(
    "older", ["OLD", [{"name": "default", "template": "OLD"}, {"name": "rag", "template": "RAG"}], None]
)
@pytest.mark.parametrize("more", [False, True])
def test_the_template_in_its_own_file_goes_first(more: bool, older: object, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, chat_template=older)
    (tmp_path / "chat_template.jinja").write_bytes(b"NEW\r\n{{ x }}")
    if more:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    pairs = read_tokenizer(tmp_path, 420)
    wanted = AutoTokenizer.from_pretrained(tmp_path).chat_template
    wanted = wanted if isinstance(wanted, dict) else {"default": wanted}
    assert pairs["tokenizer.chat_template"] == wanted["default"] == "NEW\n{{ x }}"
    assert pairs.get("tokenizer.chat_template.tool_use") == wanted.get("tool_use")
    assert "tokenizer.chat_template.rag" not in pairs


def test_templates_by_name_and_none(tmp_path: Path) -> None:
    pairs = read_tokenizer(write(tmp_path, chat_template={"default": "A", "rag": "B"}), 420)
    assert (pairs["tokenizer.chat_template"], pairs["tokenizer.chat_template.rag"]) == ("A", "B")
    assert not [key for key in read_tokenizer(write(tmp_path), 420) if "template" in key]
    with pytest.raises(ModelFileError, match="the chat template cannot be read"):
        read_tokenizer(write(tmp_path, chat_template=[{"name": "x"}]), 420)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match="the chat template cannot be read"):
        read_tokenizer(tmp_path, 420)


def test_what_training_left_in_tokenizer_json(tmp_path: Path) -> None:
    """Truncation and padding are off wherever transformers is not asked for them; dropout is refused."""
    plain = read_tokenizer(write(tmp_path), 420)
    path = tmp_path / "tokenizer.json"
    tokenizer = HFTokenizer.from_file(str(path))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=900)
    tokenizer.save(str(path))
    assert read_tokenizer(tmp_path, 420) == plain
    document = json.loads(path.read_text())
    document["model"]["dropout"] = 0.1
    path.write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match=r"merges at random \(dropout is 0.1\).*; write null there"):
        read_tokenizer(tmp_path, 420)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "files"])
def test_a_template_for_tools_is_not_the_default(place: str, tmp_path: Path) -> None:
    """transformers then wants to be told which, and takes none by itself."""
    from transformers import AutoTokenizer

    if place == "files":
        write(tmp_path, chat_template="OLD")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("TOOLS")
    else:
        write(tmp_path, chat_template=[{"name": "tool_use", "template": "TOOLS"}])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == {"tool_use": "TOOLS"}
    with pytest.raises(ValueError, match="no default"):
        theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    pairs = {key: value for key, value in read_tokenizer(tmp_path, 420).items() if "template" in key}
    assert pairs == {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "TOOLS",
    }


@pytest.mark.parametrize("template", [5, {"default": 5}, [{"name": 5, "template": "A"}], ["A"], True])
def test_templates_that_are_no_text(template: object, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_tokenizer(write(tmp_path, chat_template=template), 420)
