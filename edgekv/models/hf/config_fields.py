"""Fields of one JSON object of a config.json."""

from __future__ import annotations

from typing import Any

from edgekv.models.fields import Fields, positive


class ConfigFields(Fields):
    """The values of config.json, or of an object inside it, by name; null is as good as missing."""

    file_remedy = "download config.json again"

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        values = self.optional(name)
        numbers = [positive(value) for value in values] if isinstance(values, list) else []
        known = tuple(number for number in numbers if number is not None)
        if len(known) != count or len(numbers) != count:
            self.fail(name, f"a list of {count} positive numbers")
        return known

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, "a text")
        return value

    def inner(self, name: str) -> ConfigFields | None:
        """The fields of an object in this one, if it is there."""
        value = self.optional(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return ConfigFields(value, self.path, f"{self.prefix}{name}.")

    def layer_is_local(self, layer: int, default: bool) -> bool:
        """Whether `layer_types` gives a layer a sliding window; `default` without such a list."""
        types = self.optional("layer_types")
        if types is None:
            return default
        count = self.integer("num_hidden_layers")
        known = ("full_attention", "sliding_attention", "attention")  # the last is an older name of the first
        if not isinstance(types, list) or len(types) != count or any(kind not in known for kind in types):
            self.fail("layer_types", f"'full_attention' or 'sliding_attention' for each of {count} layers")
        return bool(types[layer] == "sliding_attention")

    def require(self, name: str, allowed: tuple[Any, ...], what: str) -> None:
        """Raise UnsupportedError unless the field is absent, null or one of `allowed`."""
        value = self.optional(name)
        if value is not None and value not in allowed:
            self.unsupported(f"{what} ({self.prefix}{name} is {value!r})")
