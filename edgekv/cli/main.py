"""The `edgekv` command: loads a subcommand's module only when it is run, so that --help is quick."""

from __future__ import annotations

import os
import sys
from typing import cast

import click

from edgekv import __version__
from edgekv.cli.common.lazy import LazyGroup
from edgekv.cli.common.streams import flush_output, is_lost_output, prepare_streams, report_lost_output
from edgekv.errors import EdgeKVError, InputError

COMMANDS = {  # name: one line for `edgekv --help`; it lives in edgekv/cli/<name>.py as `command`, or in ELSEWHERE
    "pull": "Fetch a model of the Hugging Face Hub, for any command.",
    "models": "List the models that were fetched.",
    "inspect": "What a model is, what its cache costs, what it could become.",
    "convert": "Turn a GQA model into an MLA GGUF with a small cache.",
    "heal": "Distil the original into the converted model, to lose less.",
    "quantize": "Shrink a GGUF's weights, and show the error of every tensor.",
    "export": "Write a model in another format.",
    "verify": "Run the same tokens through two models or two engines and compare.",
    "chat": "Talk to a model.",
    "pack": "Prefill documents once, for chats that begin with them.",
    "serve": "Serve a model to programs that speak OpenAI's API, and to a browser.",
    "worker": "Hold layers of a large model for a chat on another machine.",
    "eval": "Perplexity, KL and task accuracy of a model and its cache.",
    "sweep": "Compare many conversions and cache types by loss and bytes.",
    "bench": "Measure prefill and decode speed, memory, and what explains them.",
    "compare": "Put reports side by side, as tables or as a page with charts.",
    "plan": "Predict whether a model fits a board, and how fast it will be.",
    "kernel": "Build the attention kernel that makes a long cache fast in llama.cpp.",
    "doctor": "Check whether this machine is ready, and what would make it so.",
}

ELSEWHERE = {
    "pull": "edgekv.cli.hub.pull",
    "models": "edgekv.cli.hub.models",
    "worker": "edgekv.cli.talk.worker",
}  # modules of commands in a folder of theirs


@click.group(
    cls=LazyGroup,
    modules="edgekv.cli.",
    lines=COMMANDS,
    elsewhere=ELSEWHERE,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="edgekv")
def cli() -> None:
    """Language models with a small KV cache, for small machines.

    \b
    edgekv inspect model.gguf                         what it is and what its cache costs
    edgekv convert model.gguf -o small.gguf --target 0.5
    edgekv chat small.gguf
    edgekv chat hf:OWNER/NAME                         MODEL may be on the Hugging Face Hub
    """


def main() -> None:
    """Entry point: a known error becomes one line and an exit code; only a bug gives a traceback."""
    prepare_streams()
    try:
        code = _exit_code()
        flush_output()
    except OSError as error:
        if not is_lost_output(error):
            raise
        report_lost_output(error)
        code = 2
    sys.exit(code)


def _exit_code() -> str | int | None:
    """Run the command."""
    try:
        return cast("int | None", cli(standalone_mode=False))
    except SystemExit as stop:
        return stop.code
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EdgeKVError as error:
        click.echo(f"edgekv: error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        if error.filename is None:  # not one about a path that somebody gave
            raise
        click.echo(
            f"edgekv: error: {os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions",
            err=True,
        )
        return InputError.exit_code
