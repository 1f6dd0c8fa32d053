"""Typed values of model files: what is refused, and the remedy that fits the kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelFileError, UnsupportedError
from edgekv.models.fields import Fields
from edgekv.models.gguf.keys import Keys
from edgekv.models.hf.config_fields import ConfigFields

PATH = Path("model")
VALUES: dict[str, Any] = {"a": 4, "zero": 0, "flag": True, "word": "x", "half": 0.5, "nan": float("nan")}
VALUES |= {"huge": 2**31, "many": [1, 2], "null": None, "endless": 10**400, "inf": float("inf")}


def keys() -> Fields:
    return Keys(
        {f"llama.{name}": value for name, value in VALUES.items()} | {"a": 1, "gemma.b": 2}, PATH, "llama"
    )


def config() -> Fields:
    return ConfigFields(VALUES, PATH, "text_config.")


@pytest.mark.parametrize("make", [keys, config])
def test_what_is_there_and_what_is_not(make: Callable[[], Fields]) -> None:
    fields = make()
    assert fields.integer("a") == 4
    assert fields.integer("none", 7) == fields.integer("null", 7) == 7
    assert fields.integer("zero", least=0) == 0
    assert (fields.number("a"), fields.number("half"), fields.number("none", 2.0)) == (4.0, 0.5, 2.0)
    assert (fields.optional("many"), fields.optional("none"), fields.optional("b")) == ([1, 2], None, None)


@pytest.mark.parametrize(
    ("make", "start", "remedy"),
    [
        (keys, "model: key llama.", "; download another GGUF of the model, or make one with llama.cpp's "),
        (config, "model: field text_config.", "; download config.json again"),
    ],
)
def test_refusals_name_the_value_and_a_remedy(make: Callable[[], Fields], start: str, remedy: str) -> None:
    for name in ("none", "zero", "flag", "word", "half", "huge"):
        with pytest.raises(ModelFileError) as caught:
            make().integer(name)
        found = "missing" if name == "none" else repr(VALUES[name])
        wanted = f"{name} is {found}, a whole number of at least 1 was expected"
        assert str(caught.value).startswith(start + wanted + remedy)
    for name in ("none", "zero", "flag", "word", "nan", "many", "endless", "inf"):
        with pytest.raises(ModelFileError, match=f"{name} is .*, a positive number was expected"):
            make().number(name)


def test_a_sound_file_of_an_odd_model_is_not_to_be_downloaded_again() -> None:
    for fields in (keys(), config()):
        with pytest.raises(
            UnsupportedError, match=r"^model: a flying model is not supported; choose another model$"
        ):
            fields.unsupported("a flying model")
    by_layer = Keys({"llama.attention.head_count": [1, 2], "llama.block_count": 2}, PATH, "llama")
    with pytest.raises(UnsupportedError, match=r"a different llama.attention.head_count in each layer"):
        by_layer.integer("attention.head_count")


def test_lists_of_numbers() -> None:
    for wrong in (
        [1.0],
        [1.0, 2.0, 3.0],
        [1.0, 10**400],
        [1.0, float("inf")],
        [1.0, True],
        [1.0, "2"],
        1.0,
        None,
    ):
        with pytest.raises(ModelFileError, match="a list of 2 positive numbers was expected"):
            ConfigFields({"factors": wrong}, PATH).numbers("factors", 2)
    assert ConfigFields({"factors": [1, 2.5]}, PATH).numbers("factors", 2) == (1.0, 2.5)
