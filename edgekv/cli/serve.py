"""`edgekv serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import options


@options.command("serve")
@options.model(loads=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="0 takes one that is free.")
@click.option(
    "--api-key",
    default="",
    envvar="EDGEKV_API_KEY",
    help="Key that clients have to send; needed on addresses that others can reach. Also EDGEKV_API_KEY.",
)
@click.option("--parallel", type=click.IntRange(1), help="Requests answered side by side.  [default: 4]")
@click.option("--queue", default=32, show_default=True, help="Requests that wait; more get 429.")
@click.option("--max-body", default=4 * 2**20, show_default=True, help="Most bytes of a request.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Most seconds of a request.")
@options.ctx_size("Tokens of one request and its answer.  [default: up to 4096]")
@options.cache_type("How keys and values are stored.  [default: f16]")
@options.budget()
@click.option("--packs", type=options.PATH, help="Folder of packs that requests can name.")
@click.option(
    "--sessions",
    type=options.PATH,
    help="Folder for what the cache lets go of; it is found again after a restart.",
)
@click.option("--sessions-bytes", default=2**30, show_default=True, help="Most bytes there.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="URL",
    help="A server of the same model, which may help. Repeatable.",
)
@click.option(
    "--peer-key",
    default="",
    envvar="EDGEKV_PEER_KEY",
    help="Key of all servers that help each other; needed between machines. Also EDGEKV_PEER_KEY.",
)
@options.threads()
@options.backend()
@options.kernel()
@options.as_json("Print the address and the engine's figures as one line of JSON once requests are taken.")
def command(model: Path, parallel: int | None, as_json: bool, **wanted: Any) -> None:
    """Serve MODEL to programs that speak OpenAI's API, and to a browser.

    \b
    edgekv serve model.gguf
    edgekv serve model.gguf --parallel 2 -c 8192 --cache-type q4_0
    edgekv serve model.gguf --host 0.0.0.0 --api-key "$KEY"
    edgekv serve model.gguf --host 0.0.0.0 --api-key "$KEY" --peer-key "$PEERS" --peer http://pi-2:8080
    curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d @question.json

    The cache holds --parallel times --ctx-size tokens, all of it from the start. What running requests leave
    free of it keeps earlier prompts, which later ones that begin alike need not compute again. The engine runs in
    a process of its own: if it crashes, running requests get an error and it is started again. Ctrl-C ends it.

    With --peer servers of one model tell each other what they have cached. A request goes where its answer costs
    least: to a peer, here with rows that a peer gives, or here alone, which it also does when peers fail.

    Exit codes: 2 the input cannot be used, 3 the engine cannot be started, 130 ended by Ctrl-C.
    """
    from edgekv.workflows.serve import ServeRequest, ServerSettings, default_parallel, serve_model

    wanted["parallel"] = parallel or default_parallel(model, wanted["backend"], wanted["budget"])
    request = ServeRequest(model, options.build(ServerSettings, wanted), **wanted)

    def ready(address: str, about: dict[str, Any]) -> None:
        if as_json:
            click.echo(
                json.dumps({"address": address, **about})
            )  # one line, at which a script can stop reading
            return
        for pack in about["packs"]:
            if "error" in pack:
                click.echo(f"pack left out: {pack['error']}", err=True)
        megabytes = about["cache_nbytes"] / 1e6
        click.echo(
            f"{address} serves {model.name}: {about['n_parallel']} requests of {about['n_ctx']} tokens side by side, "
            f"{megabytes:.1f} MB of cache"
        )

    serve_model(request, ready, lambda words: click.echo(words, err=True))
