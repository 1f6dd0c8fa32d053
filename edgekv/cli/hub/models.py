"""`edgekv models`: what is in the cache of the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json, print_table


@options.command("models")
@options.as_json()
def command(as_json: bool) -> None:
    """List the models in the Hugging Face Hub's cache, under the names that open them.

    \b
    edgekv models
    edgekv models --json | jq -r .models[0].path

    `hf cache rm` of huggingface_hub removes them.
    """
    from edgekv.workflows.hub.pull import list_models

    folder, found = list_models()
    if as_json:
        models = [{**asdict(model), "path": str(model.path)} for model in found]
        print_json({"cache": str(folder), "models": models})
    elif found:
        print_table(
            ("name", "MB", "kind", "commit"),
            ((model.name, f"{model.nbytes / 1e6:,.1f}", model.kind, model.commit[:8]) for model in found),
        )
    else:
        click.echo(f"no models in {folder}; `edgekv pull hf:OWNER/NAME` fetches one")
