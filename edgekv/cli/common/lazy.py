"""Command groups whose modules are imported only when they are run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose command <name> is `command` in the module <modules><name>.

    Args:
        modules: what stands before the name, such as "edgekv.cli.".
        lines: one line of help for each name; help lists them without importing anything.
        elsewhere: the modules of names that have another.
    """

    def __init__(
        self,
        *args: Any,
        modules: str,
        lines: Mapping[str, str],
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._modules = modules
        self._lines = lines
        self._elsewhere = elsewhere

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lines)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lines:
            return None
        command = importlib.import_module(self._elsewhere.get(cmd_name, self._modules + cmd_name)).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._lines.items()))
