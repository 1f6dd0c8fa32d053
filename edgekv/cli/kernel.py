"""`edgekv kernel`: build the attention kernel for this machine."""

from __future__ import annotations

import json
import time

import click

from edgekv.cli.common import options


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
    from edgekv.backends.llama_cpp.kernel.build import build, build_path, is_built

    started = time.monotonic()
    fresh = force or not is_built()
    path = build() if fresh else build_path()
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps({"path": str(path), "built": fresh, "seconds": round(seconds, 3)}, indent=1))
    else:
        click.echo(f"built and checked in {seconds:.1f} s: {path}" if fresh else f"already built: {path}")
