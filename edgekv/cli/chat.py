"""`edgekv chat`: a conversation with a model, or one answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.backends.kernel_names import RPC_VARIABLE
from edgekv.cli.common import options
from edgekv.errors import InputError

if TYPE_CHECKING:
    from edgekv.workflows.chat import Chat


@options.command("chat")
@options.model(loads=True)
@click.option("-p", "--prompt", help="Ask this one thing, print the answer, and leave.")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Ask with this file's text (- is standard input), after --prompt if both are given.",
)
@click.option("--system", default="", help="System prompt.")
@click.option("--session", type=options.PATH, metavar="FILE",
              help="Keep the conversation and its cache in FILE, and go on with what is in it.")  # fmt: skip
@click.option("--pack", "packs", type=options.PATH, multiple=True, metavar="FILE",
              help="Begin with the documents of a pack (`edgekv pack`). May be repeated.")  # fmt: skip
@click.option("--no-template", "template", flag_value=False, default=True, type=bool,
              help="Continue the text as it is, without the chat template.")  # fmt: skip
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="Longest answer.  [default: the context]")
@click.option("--stop", multiple=True, help="End the answer before this text. May be repeated.")
@click.option("--temp", "--temperature", "temperature", type=float, default=0.8, show_default=True,
              help="0 always takes the likeliest token.")  # fmt: skip
@click.option("--top-k", type=int, default=40, show_default=True, help="0 turns it off.")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="1 turns it off.")
@click.option("--min-p", type=float, default=0.05, show_default=True, help="0 turns it off.")
@click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="1 turns it off.")
@click.option("--repeat-last-n", type=int, default=64, show_default=True, help="Tokens the penalty sees.")
@options.seed("Seed of the sampling: the same question then gives the same answer.", default=None)
@options.ctx_size("Tokens of context.  [default: the session's, else up to 4096]")
@options.cache_type("How keys and values are stored.  [default: the session's or pack's, else f16]")
@options.budget()
@options.threads()
@options.backend()
@options.kernel()
@click.option("--rpc", metavar="HOST:PORT,...",
              help="Workers (`edgekv worker`) that take a part of the layers; for trusted networks alone.")  # fmt: skip
@click.option("--stats", is_flag=True, help="Show times, tokens/s and memory after each answer.")
@options.as_json("One-shot: the answer and its figures as JSON.")
def command(
    model: Path,
    prompt: str | None,
    file: Path | None,
    rpc: str | None,
    stats: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Talk to MODEL: a GGUF file, or a folder that `edgekv export onnx` wrote.

    \b
    edgekv chat model.gguf                                  a conversation; /help inside
    edgekv chat model.gguf -p "Why is the sky blue?"        one answer
    edgekv chat model.gguf -p "Sum this up:" -f notes.txt   one answer about a file
    git diff | edgekv chat model.gguf -p "Review:" -f -     or about what a pipe brings
    edgekv chat model.gguf -p "Hi" --temp 0 --json          figures for a script
    edgekv chat model.gguf -c 32768 --cache-type q8_0 --stats
    edgekv chat model.gguf --budget 2048                    talks on in the memory of 2,048 tokens
    edgekv chat large.gguf --rpc pi-2:50052,pi-3:50052      layers on other boards
    edgekv chat model.gguf --session talk.session           goes on where it ended, without a prefill

    Answers go to standard output, everything else to standard error. Ctrl-C stops an answer. The engine
    runs in a process of its own: if it crashes, the conversation stays.

    Exit codes: 0 answered, 2 the input cannot be used, 3 the engine failed, 130 stopped by Ctrl-C.
    """
    question = one_shot_question(prompt, file)
    if as_json and question is None:
        raise click.UsageError("--json answers one question: give it with --prompt, --file or a pipe")
    if rpc is not None:
        os.environ[RPC_VARIABLE] = rpc  # for the engine's process
    from edgekv.workflows.chat import ChatRequest, SamplingParams, open_chat

    request = ChatRequest(model, sampling=options.build(SamplingParams, wanted), **wanted)
    with open_chat(request) as chat:
        if request.template and not chat.has_template:
            click.echo("this model has no chat template: it continues the text as it is", err=True)
        size, trained = request.ctx_size, chat.engine.n_ctx_train
        if size is not None and trained is not None and size > trained:
            click.echo(f"a context of {size} tokens, trained for {trained}: worse beyond that", err=True)
        for words in chat.found:
            click.echo(f"[{words}]", err=True)
        if question is not None:
            answer_once(chat, model, question, stats=stats, as_json=as_json)
            return
        from edgekv.cli.talk.repl import Repl

        Repl(chat.session, chat.engine, model.name, always_stats=stats).run()


def one_shot_question(prompt: str | None, file: Path | None) -> str | None:
    """What to ask, or None for a conversation. Standard input is read with `-f -`, or if nothing else is given
    and it is not a terminal."""
    if prompt is None and file is None and not sys.stdin.isatty():
        file = Path("-")
    parts = [] if prompt is None else [prompt]
    if file is not None:
        from edgekv.text.files import decoded

        try:
            data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            parts.append(decoded(data).rstrip("\n"))
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} is not text in UTF-8 or UTF-16 ({error}); convert it first, for instance with iconv"
            ) from error
    if not parts:
        return None
    question = "\n\n".join(parts)
    if not question.strip():
        raise InputError("the question is empty; give it with --prompt, --file or a pipe")
    return question


def answer_once(chat: Chat, model: Path, question: str, *, stats: bool, as_json: bool) -> None:
    """Print one answer to standard output; leave with 130 if Ctrl-C cut it short."""
    from edgekv.cli.talk.answers import figures, show_answer, stats_line

    engine = chat.engine
    answer = show_answer(chat.session, engine, chat.ask(question), visible=not as_json)
    if as_json:
        report = {
            "model": str(model),
            "backend": engine.name,
            "text": answer.step.text,
            "finish": answer.step.finish,
            **figures(answer, engine),
        }
        escaped = not sys.stdout.encoding.lower().startswith("utf")  # nothing of the text may be lost
        click.echo(json.dumps(report, ensure_ascii=escaped, indent=2))
    if stats:
        click.echo(stats_line(answer, engine), err=True)
    if answer.step.finish == "interrupted":
        sys.exit(130)
