"""Errors on their way from one process to another."""

import json

import pytest

from edgekv import errors
from edgekv.errors import BackendError, EdgeKVError, from_wire, to_wire


def tree(kind: type[EdgeKVError]) -> set[type[EdgeKVError]]:
    return {kind}.union(*(tree(child) for child in kind.__subclasses__()))


def test_every_kind_of_error_crosses_with_its_class() -> None:
    named_there = {kind for kind in tree(EdgeKVError) if kind.__module__ == errors.__name__}
    assert set(errors._KINDS) == named_there
    for kind in errors._KINDS:
        crossed = from_wire(*json.loads(json.dumps(to_wire(kind("a file is bad; get another")))))
        assert (type(crossed), str(crossed)) == (kind, "a file is bad; get another")


@pytest.mark.parametrize("kind", ["Unheard", "annotations", "to_wire", "_KINDS"])
def test_an_unknown_kind_is_a_backend_error(kind: str) -> None:
    assert type(from_wire(kind, "words")) is BackendError


def test_what_was_not_raised_on_purpose_is_a_backend_error() -> None:
    assert to_wire(ZeroDivisionError("by 0")) == (
        "BackendError",
        "the engine failed: ZeroDivisionError: by 0",
    )
    kind, message = to_wire(MemoryError())
    assert kind == "BackendError"
    assert message.startswith("out of memory; ")
