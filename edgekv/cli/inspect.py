"""`edgekv inspect`: what a model is, what its cache costs, what it could become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options


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
        click.echo(json.dumps(found, indent=1))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shape = ", ".join(f"{key} {value:g}" for key, value in found["shape"].items())
    mix = ", ".join(
        f"{kind} {count / found['parameters']:.1%}" for kind, count in found["quantization"].items()
    )
    console.print(f"[bold]{found['name']}[/bold]  {found['architecture']}, {found['attention']}")
    console.print(
        f"{found['parameters'] / 1e6:.1f}M parameters, {found['n_layers']} layers, width {found['dim']}, "
        f"{found['n_heads']} heads, {shape}"
    )
    console.print(f"weights: {mix}; context {found['context_length']}, vocabulary {found['vocab']}")
    contexts: dict[str, int] = next(iter(found["cache"]["bytes"].values()), {})
    table = Table("cache type", "bytes per token", *(f"{int(n) // 1024}K context" for n in contexts))
    for kind, size in found["cache"]["bytes_per_token"].items():
        table.add_row(
            kind, f"{size:,}", *(f"{n / 2**20:,.1f} MiB" for n in found["cache"]["bytes"][kind].values())
        )
    console.print(table)
    if found["could_become"]:
        table = Table("convert --target", "latent + rope key", "values per token per layer", "kept")
        for row in found["could_become"]:
            table.add_row(
                f"{row['target']:g}",
                f"{row['kv_lora_rank']} + {row['rope_dim']}",
                str(row["values_per_token_per_layer"]),
                f"{row['kept']:.0%}",
            )
        console.print(table)
    if found["obstacle"]:
        console.print(found["obstacle"], highlight=False)
    for key, value in found["made_by"].items():
        console.print(f"{key}: {value}", highlight=False)
