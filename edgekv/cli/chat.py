"""`edgekv chat`: talk to a model, or ask it one thing."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.backends.open import KINDS, Kind
from edgekv.spec import CACHE_BLOCKS

if TYPE_CHECKING:
    from edgekv.backends.isolated.backend import IsolatedBackend
    from edgekv.chat.session import ChatSession, PromptFormat
    from edgekv.tokenizer.language import Language


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Ask this one thing, print the answer, and leave.")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Ask what this file says (- is standard input), after --prompt if both are given.",
)
@click.option("--system", default="", help="System prompt.")
@click.option("--no-template", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="Longest answer [default: the context].")
@click.option("--stop", multiple=True, help="End the answer before this text. May be repeated.")
@click.option("--temp", "--temperature", "temperature", type=float, default=0.8, show_default=True,
              help="0 always takes the likeliest token.")  # fmt: skip
@click.option("--top-k", type=int, default=40, show_default=True, help="0 turns it off.")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="1 turns it off.")
@click.option("--min-p", type=float, default=0.05, show_default=True, help="0 turns it off.")
@click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="1 turns it off.")
@click.option("--repeat-last-n", type=int, default=64, show_default=True, help="Tokens the penalty sees.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes the same question give the same answer.")
@click.option("-c", "--ctx-size", type=click.IntRange(1), help="Tokens remembered [default: up to 4096].")
@click.option(
    "--cache-type", type=click.Choice(list(CACHE_BLOCKS)), help="How they are stored [default: f16]."
)
@click.option("-t", "--threads", type=click.IntRange(1), help="[default: the big cores]")
@click.option("--backend", type=click.Choice(KINDS), help="Engine.  [default: what MODEL is made for]")
@click.option("--stats", is_flag=True, help="Tell times, tokens/s and memory after each answer.")
@click.option("--json", "as_json", is_flag=True, help="One-shot: the answer and its figures as JSON.")
def command(
    model: Path,
    prompt: str | None,
    file: Path | None,
    system: str,
    no_template: bool,
    max_tokens: int | None,
    stop: tuple[str, ...],
    ctx_size: int | None,
    cache_type: str | None,
    threads: int | None,
    backend: Kind | None,
    stats: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk to MODEL: a GGUF file, or a folder that `edgekv export onnx` wrote.

    \b
    edgekv chat model.gguf                                  a conversation; /help inside
    edgekv chat model.gguf -p "Why is the sky blue?"        one answer
    edgekv chat model.gguf -p "Sum this up:" -f notes.txt   one answer about a file
    git diff | edgekv chat model.gguf -p "Review:" -f -     or about what a pipe brings
    edgekv chat model.gguf -p "Hi" --temp 0 --json          figures for a script
    edgekv chat model.gguf -c 32768 --cache-type q8_0 --stats

    Answers go to standard output, everything else to standard error. Ctrl-C stops an answer. The engine
    runs in a process of its own: if it crashes, the conversation stays.

    Exit codes: 0 answered, 2 the input cannot be used, 3 the engine failed, 130 stopped by Ctrl-C.
    """

    question = one_shot_question(prompt, file)
    if as_json and question is None:
        raise click.UsageError("--json answers one question: give it with --prompt, --file or a pipe")
    from edgekv.backends.isolated.backend import IsolatedBackend
    from edgekv.chat.generate import Generator
    from edgekv.chat.sampling import Sampler, SamplingParams
    from edgekv.chat.session import ChatSession

    sampler = Sampler(SamplingParams(**sampling))
    engine = IsolatedBackend(model, backend, n_ctx=ctx_size, cache_type=cache_type, n_threads=threads)
    with contextlib.closing(engine):
        language = engine.language()
        prompt_format = read_format(model, language, use_template=not no_template)
        session = ChatSession(
            Generator(engine, language, engine.interrupt),
            prompt_format,
            sampler,
            system=system,
            max_tokens=max_tokens,
            stop=stop,
        )
        if not prompt_format.has_template and not no_template:
            click.echo("this model has no chat template: it continues the text as it is", err=True)
        if question is not None:
            answer_once(session, engine, model, question, stats=stats, as_json=as_json)
            return
        from edgekv.cli.talk.repl import Repl

        Repl(session, engine, model.name, always_stats=stats).run()


def read_format(model: Path, language: Language, use_template: bool) -> PromptFormat:
    """The model's prompt format."""
    from edgekv.chat.session import PromptFormat
    from edgekv.errors import ModelFileError

    if not use_template:
        return PromptFormat(language, None)
    try:
        return PromptFormat.of_model(language)
    except ModelFileError as error:
        raise ModelFileError(f"{model}: {error}; go on without it with --no-template") from error


def one_shot_question(prompt: str | None, file: Path | None) -> str | None:
    """What to ask, or None for a conversation. Standard input is read with `-f -`, or if nothing else is given
    and it is not a terminal."""
    from edgekv.errors import InputError

    if prompt is None and file is None and not sys.stdin.isatty():
        file = Path("-")
    parts = [] if prompt is None else [prompt]
    if file is not None:
        try:
            data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            parts.append(data.decode().rstrip("\n"))
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} is not UTF-8 text ({error}); convert it first, for instance with iconv"
            ) from error
    if not parts:
        return None
    question = "\n\n".join(parts)
    if not question.strip():
        raise InputError("the question is empty; give it with --prompt, --file or a pipe")
    return question


def answer_once(
    session: ChatSession, engine: IsolatedBackend, model: Path, question: str, *, stats: bool, as_json: bool
) -> None:
    """Print one answer to standard output; leave with 130 if Ctrl-C cut it short."""
    from edgekv.cli.talk.answers import figures, show_answer, stats_line

    answer = show_answer(session, session.ask(question), visible=not as_json)
    if as_json:
        report = {
            "model": str(model),
            "backend": engine.name,
            "text": answer.text,
            "finish": answer.finish,
            **figures(answer.timings, engine),
        }
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
    if stats:
        click.echo(stats_line(answer.timings, engine), err=True)
    if answer.finish == "interrupted":
        sys.exit(130)
