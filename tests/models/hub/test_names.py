"""Which files of a repository a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekv.errors import InputError
from edgekv.models.hub.names import HubFile, HubName, choose, is_hub_name, parse_name

QWEN = [
    *(
        f"qwen2.5-1.5b-instruct-{quant}.gguf"
        for quant in ("fp16", "q2_k", "q4_0", "q4_k_m", "q5_k_m", "q8_0")
    ),
    "README.md",
]
SPLIT = [
    "Q8_0/big-Q8_0-00001-of-00002.gguf",
    "Q8_0/big-Q8_0-00002-of-00002.gguf",
    "big-BF16-00001-of-00002.gguf",
]
FOLDER = [
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "README.md",
]


def files(names: list[str]) -> list[HubFile]:
    return [HubFile(name, 1000) for name in names]


def chosen(names: list[str], wanted: str | None = None) -> tuple[str, int]:
    choice = choose(HubName("o/n", wanted), files(names))
    return choice.first, len(choice.files)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:o/n", HubName("o/n")),
        ("hf:o/n:Q4_K_M", HubName("o/n", "Q4_K_M")),
        ("hf:o-1/n_2.5:a/b.gguf", HubName("o-1/n_2.5", "a/b.gguf")),
        ("hf://o/n", HubName("o/n")),
        ("hf:gpt2", HubName("gpt2")),
    ],
)
def test_names_are_read_as_text_and_as_paths(text: str, name: HubName) -> None:
    assert parse_name(text) == parse_name(Path(text)) == name


@pytest.mark.parametrize("text", ["hf:", "hf:o/n/m", "hf:o/n:", "hf:o n/m", "hf:../x", "o/n"])
def test_what_has_another_form_is_refused(text: str) -> None:
    if text == "hf:../x":
        assert parse_name(text).repo == "../x"  # huggingface_hub refuses it
        return
    with pytest.raises(InputError, match="write hf:OWNER/NAME"):
        parse_name(text)


def test_paths_are_no_names() -> None:
    assert not is_hub_name(Path("./hf:o/n").absolute())
    assert is_hub_name(Path("hf:o/n"))


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (QWEN, None, ("qwen2.5-1.5b-instruct-q4_k_m.gguf", 1)),
        (QWEN, "Q8_0", ("qwen2.5-1.5b-instruct-q8_0.gguf", 1)),
        (QWEN, "q4_0", ("qwen2.5-1.5b-instruct-q4_0.gguf", 1)),
        (QWEN, "qwen2.5-1.5b-instruct-fp16.gguf", ("qwen2.5-1.5b-instruct-fp16.gguf", 1)),
        (SPLIT, None, (SPLIT[0], 2)),  # the other lacks a part
        (SPLIT, SPLIT[1], (SPLIT[0], 2)),
        (FOLDER, None, ("", 3)),
        (FOLDER + QWEN, None, ("qwen2.5-1.5b-instruct-q4_k_m.gguf", 1)),
        (FOLDER + QWEN, "safetensors", ("", 3)),
        (["mmproj-model-Q4_K_M.gguf", "x-UD-Q4_K_XL.gguf"], "q4_k_xl", ("x-UD-Q4_K_XL.gguf", 1)),
        (["model.gguf", "model.imatrix.gguf"], None, ("model.gguf", 1)),
    ],
)
def test_files_are_chosen(names: list[str], wanted: str | None, expected: tuple[str, int]) -> None:
    assert chosen(names, wanted) == expected


def test_what_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(InputError, match="no 'q4_k_x' in o/n; it has Q4_K_M, Q5_K_M"):
        chosen(QWEN, "q4_k_x")
    with pytest.raises(InputError, match=r"it has .*safetensors"):
        chosen(FOLDER, "zzz")


def test_a_repository_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"neither a GGUF nor safetensors.*; choose another"):
        chosen(["README.md", "pytorch_model.bin"])
