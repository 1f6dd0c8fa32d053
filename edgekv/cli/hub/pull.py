"""`edgekv pull`: a model of the Hugging Face Hub, into the cache."""

from __future__ import annotations

from dataclasses import asdict

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json
from edgekv.cli.common.progress import stages


@options.command("pull")
@click.argument("model", metavar="hf:OWNER/NAME[:QUANT or FILE]")
@options.as_json()
def command(model: str, as_json: bool) -> None:
    """Fetch a model of the Hugging Face Hub into its cache, and print where it lies.

    \b
    edgekv pull hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF            EdgeKV chooses, q4_k_m first
    edgekv pull hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:q8_0       or you: a quantization
    edgekv pull hf:OWNER/NAME:model-q4_0.gguf                 or a file
    edgekv pull hf:Qwen/Qwen2.5-0.5B-Instruct                 safetensors where there is no GGUF
    edgekv chat hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF            every MODEL may be such a name

    huggingface_hub keeps the cache and your token: HF_HOME moves it to another disk, HF_TOKEN or `hf auth login`
    opens gated models, HF_HUB_OFFLINE=1 asks nobody. A split GGUF comes whole; every file is checked by its SHA-256.
    """
    from edgekv.workflows.hub.pull import PullRequest, pull_model

    pulled = pull_model(PullRequest(model), stages(quiet=as_json))
    if as_json:
        print_json({**asdict(pulled), "path": str(pulled.path)})
        return
    fetched = "was there" if not pulled.fetched_nbytes else f"fetched {pulled.fetched_nbytes / 1e6:,.1f} MB"
    about = f"{pulled.kind}, {pulled.nbytes / 1e6:,.1f} MB, commit {pulled.commit[:8]}"
    click.echo(f"{pulled.name}: {about}; {fetched}", err=True)
    click.echo(pulled.path)
