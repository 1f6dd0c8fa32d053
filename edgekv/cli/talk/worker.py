"""`edgekv worker`: layers of a model for a chat on another machine."""

from __future__ import annotations

import signal
from typing import Any

import click

from edgekv.cli.common import options


@options.command("worker")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=50052, show_default=True, help="Port to listen on.")
@options.threads()
def command(**wanted: Any) -> None:
    """Hold and run layers of a model that is too large for one machine, for `edgekv chat --rpc` on another.

    This is llama.cpp's own RPC engine: it asks for no key, encrypts nothing, and does what a connection tells it to.
    Listen only where everybody is trusted. It makes room for larger models and nothing faster: a token passes one
    machine after the other.

    \b
    edgekv worker --host 192.168.1.12                       on the other boards
    edgekv chat large.gguf --rpc 192.168.1.12:50052         on this one

    Exit codes: 2 an option cannot be used, 3 llama.cpp is built without RPC.
    """
    from edgekv.workflows.serve import WorkerRequest, serve_layers

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # native code waits, and would never let Python see it
    serve_layers(WorkerRequest(**wanted))
