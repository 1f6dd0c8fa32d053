"""`edgekv inspect`: a model's shape, the bytes of its cache, and the conversions that are open to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json, print_table


@options.command("inspect")
@options.model()
@options.as_json()
def command(model: Path, as_json: bool) -> None:
    """Show a model's shape, its quantization, its cache's bytes, and what conversion offers.

    \b
    edgekv inspect model.gguf
    edgekv inspect model.gguf --json | jq .cache.bytes_per_token.f16
    """
    from edgekv.workflows.inspect import describe_model

    found = describe_model(model)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    shape = ", ".join(f"{key} {value:g}" for key, value in found["shape"].items())
    mix = ", ".join(
        f"{kind} {count / found['parameters']:.1%}" for kind, count in found["quantization"].items()
    )
    click.echo(f"{click.style(found['name'], bold=True)}  {found['architecture']}, {found['attention']}")
    click.echo(
        f"{found['parameters'] / 1e6:.1f}M parameters, {found['n_layers']} layers, width {found['dim']}, "
        f"{found['n_heads']} heads, {shape}"
    )
    click.echo(f"weights: {mix}; context {found['context_length']}, vocabulary {found['vocab']}")
    cache = found["cache"]
    contexts: dict[str, int] = next(iter(cache["bytes"].values()), {})
    print_table(
        ("cache type", "bytes per token", *(f"{int(n) // 1024}K context" for n in contexts)),
        (
            (kind, f"{size:,}", *(f"{n / 2**20:,.1f} MiB" for n in cache["bytes"][kind].values()))
            for kind, size in cache["bytes_per_token"].items()
        ),
    )
    if cache["window"]:
        click.echo(
            f"{cache['layers_with_window']} of {found['n_layers']} layers keep little more than their window of "
            f"{cache['window']:,} tokens, however long the context"
        )
    if found["could_become"]:
        print_table(
            ("convert --target", "latent + rope key", "values per token per layer", "kept"),
            (
                (
                    f"{row['target']:g}",
                    f"{row['kv_lora_rank']} + {row['rope_dim']}",
                    str(row["values_per_token_per_layer"]),
                    f"{row['kept']:.0%}",
                )
                for row in found["could_become"]
            ),
        )
    if found["obstacle"]:
        click.echo(found["obstacle"])
    for key, value in found["made_by"].items():
        click.echo(f"{key}: {value}")
