"""`edgekv kernel`: build the attention kernel for this machine."""

from __future__ import annotations

import time

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json


@options.command("kernel")
@options.force("Build it again.")
@options.as_json()
def command(force: bool, as_json: bool) -> None:
    """Build the attention kernel, a plug-in for llama.cpp that reads each cached row once for all heads.

    Takes seconds and a C++ compiler. The build is compared with NumPy, kept in the cache folder, and used from then
    on by chat, bench, eval, sweep and verify; --kernel stock leaves it out.

    \b
    edgekv kernel
    edgekv kernel --force
    edgekv chat model.gguf --kernel stock --stats
    """
    from edgekv.backends.llama_cpp.kernel.build import build, built_path

    started = time.monotonic()
    kept = None if force else built_path()
    path = kept or build()
    seconds = time.monotonic() - started
    if as_json:
        print_json({"path": str(path), "built": kept is None, "seconds": round(seconds, 3)})
    else:
        click.echo(
            f"built and checked in {seconds:.1f} s: {path}" if kept is None else f"already built: {path}"
        )
