"""Options that several commands share: declared once, spelt one way.

    -o/--output   -f/--force...   --json   --text   --text-tokens   -c/--ctx-size   --cache-type   -t/--threads
    --backend     --seed     the size of a latent     how an evaluation is carried out

`command` makes a click command that refuses a renamed option with its new name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import click

from edgekv.backends.kernel_names import KERNEL_VARIABLE, KERNELS
from edgekv.backends.open import KINDS
from edgekv.cache.policies.names import DEFAULT_POLICY, LAYER_BUDGETS
from edgekv.models.hub.names import is_hub_name
from edgekv.quant.formats import CACHE_TYPES

Function = TypeVar("Function", bound=Callable[..., Any])
Option = Callable[[Function], Function]
T = TypeVar("T")

PATH = click.Path(path_type=Path)


class ModelPath(click.Path):
    """A path, or a name on the Hub: hf:OWNER/NAME[:QUANT or FILE], which is fetched before the command runs.

    Args:
        loads: whether the command keeps the weights in memory.
    """

    def __init__(self, loads: bool = False) -> None:
        super().__init__(path_type=Path)
        self.loads = loads


MODEL = ModelPath()
LOADED_MODEL = ModelPath(loads=True)
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "--cache": "--cache-type",
        "--calib": "--text",
        "--calib-tokens": "--text-tokens",
        "--context": "--ctx-size",
        "--dtype": "--weights",
        "--eval": "--eval-text",
        "--positions": "--text FILE --measure positions",
        "--retrieval": "--text FILE --measure needles",
        "--sweep": "the command `edgekv sweep FILE`",
        "--tokens": "--text-tokens",
    }
)


def parsed(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that parses an option's text; a ValueError becomes a usage error that names the option."""

    def convert(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return convert


def build(kind: type[T], wanted: dict[str, Any]) -> T:
    """A `kind` made of the options that are its fields; they are taken out of `wanted`."""
    return kind(**{name: wanted.pop(name) for name in kind.__annotations__ if name in wanted})


def parse_words(text: str) -> tuple[str, ...]:
    """Words from "f16, q8_0"."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


class Command(click.Command):
    """A command that answers a renamed option with its new name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in RENAMED:
                message = f"No such option: {error.option_name}; it is {RENAMED[error.option_name]}"
                raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        for param in self.params:
            if param.name and isinstance(param.type, ModelPath) and (given := ctx.params.get(param.name)):
                ctx.params[param.name] = _local(given, param.type, bool(ctx.params.get("as_json")))
        return super().invoke(ctx)


def local_model(given: Path, quiet: bool) -> Path:
    """Where a model lies that a file names, as for MODEL."""
    found = _local(given, LOADED_MODEL, quiet)
    assert isinstance(found, Path)
    return found


def _local(given: Path | tuple[Path, ...], kind: ModelPath, quiet: bool) -> Path | tuple[Path, ...]:
    """Where models lie: a path as it is, a name on the Hub fetched into its cache."""
    if isinstance(given, tuple):
        return tuple(_local(each, kind, quiet) for each in given)  # type: ignore[misc]
    if not is_hub_name(given):
        return given
    from edgekv.cli.common.progress import stages
    from edgekv.models.hub.pull import pull

    return pull(given, stages(quiet), kind.loads).path


def command(name: str) -> Callable[[Callable[..., Any]], Command]:
    """A subcommand of `edgekv`."""
    return click.command(
        name, cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
    )


def model(required: bool = True, loads: bool = False) -> Option[Any]:
    """The argument MODEL. `loads`: the command keeps its weights in memory."""
    return click.argument("model", type=LOADED_MODEL if loads else MODEL, required=required)


def output(help_text: str, required: bool = True) -> Option[Any]:
    """-o/--output, a file or folder to write."""
    return click.option("-o", "--output", required=required, type=PATH, help=help_text)


def force(help_text: str = "Replace the output.") -> Option[Any]:
    """--force."""
    return click.option("--force", is_flag=True, help=help_text)


def as_json(help_text: str = "Print one JSON object.") -> Option[Any]:
    """--json, `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def text(help_text: str, multiple: bool = False) -> Option[Any]:
    """--text, a plain text file in UTF-8."""
    return click.option("--text", type=PATH, multiple=multiple, metavar="FILE", help=help_text)


def text_tokens(default: int | None, help_text: str) -> Option[Any]:
    """--text-tokens."""
    shown = default is not None
    return click.option(
        "--text-tokens", default=default, type=int, show_default=shown, metavar="N", help=help_text
    )


def seed(help_text: str, default: int | None = 0) -> Option[Any]:
    """--seed."""
    return click.option(
        "--seed",
        default=default,
        type=click.IntRange(min=0),
        show_default=default is not None,
        help=help_text,
    )


def ctx_size(help_text: str, default: int | None = None, least: int = 1) -> Option[Any]:
    """-c/--ctx-size, tokens of context."""
    return click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(least),
        default=default,
        show_default=default is not None,
        metavar="N",
        help=help_text,
    )


def cache_type(help_text: str, choices: Sequence[str] = (), default: str | None = None) -> Option[Any]:
    """--cache-type, how cached keys and values (or latents) are stored; without choices the engine decides."""
    known = choices or CACHE_TYPES
    pairs = "" if choices else ", or two for K and V, as in q8_0/q4_0"
    return click.option(
        "--cache-type",
        type=click.Choice(choices) if choices else str,
        default=default,
        show_default=default is not None,
        metavar="TYPE",
        help=f"{help_text} One of {', '.join(known)}{pairs}.",
    )


def threads() -> Option[Any]:
    """-t/--threads."""
    return click.option(
        "-t",
        "--threads",
        type=click.IntRange(1),
        metavar="N",
        help="Threads of the engine.  [default: one per big physical core]",
    )


def budget() -> Option[Any]:
    """--budget, --policy and --layers, a cache of fixed size."""
    return _all(
        click.option(
            "--budget",
            type=click.IntRange(1),
            metavar="N",
            help="Tokens that stay in the cache; others are evicted.  [default: all of the context]",
        ),
        click.option(
            "--policy",
            default=DEFAULT_POLICY,
            show_default=True,
            help="Which stay: streaming, knorm, keydiff, or critical- in front of one; docs/eviction.md has more.",
        ),
        click.option(
            "--layers",
            type=click.Choice(LAYER_BUDGETS),
            default=LAYER_BUDGETS[0],
            show_default=True,
            help="How --budget is spread over layers; others than uniform in the reference alone.",
        ),
    )


def backend(
    help_text: str = "Engine.  [default: the one for MODEL's format]",
    flag: str = "--backend",
    default: str | None = None,
) -> Option[Any]:
    """--backend, an inference engine."""
    return click.option(
        flag, type=click.Choice(KINDS), default=default, show_default=default is not None, help=help_text
    )


def kernel() -> Option[Any]:
    """--kernel, which attention llama.cpp runs: for this process and all that it starts."""

    def choose(_: click.Context, __: click.Parameter, value: str | None) -> None:
        if value:
            os.environ[KERNEL_VARIABLE] = value

    return click.option(
        "--kernel",
        type=click.Choice(KERNELS),
        expose_value=False,
        callback=choose,
        help="Attention of llama.cpp: EdgeKV's kernel or its own.  [default: the kernel where it is built]",
    )


def _all(*options: Option[Any]) -> Option[Any]:
    """Several options as one decorator, in their order."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


effort = _all(
    threads(),
    click.option(
        "-j",
        "--jobs",
        type=click.IntRange(1),
        metavar="N",
        help="Processes that share the threads.  [default: one per core, as memory allows]",
    ),
    click.option("--cache-dir", type=PATH, help="Journals and references.  [default: ~/.cache/edgekv/eval]"),
    click.option("--fresh", is_flag=True, help="Ignore the results of earlier runs."),
)


def latent_size(rope_default: str) -> Option[Any]:
    """--target, --kv-lora-rank, --rope-dim and --nope-dim: the size of the latent to convert to."""
    return _all(
        click.option(
            "--target", type=float, help="Share of the cache to keep, e.g. 0.5; picks SIMD-friendly sizes."
        ),
        click.option("--kv-lora-rank", type=int, help="Width of the latent, instead of --target."),
        click.option(
            "--rope-dim",
            type=int,
            help=f"Width of the shared rope key (qk_rope_head_dim).  [default: {rope_default}]",
        ),
        click.option(
            "--nope-dim",
            type=int,
            help="Query dims per head that read the latent (qk_nope_head_dim).  [default: 32]",
        ),
    )
