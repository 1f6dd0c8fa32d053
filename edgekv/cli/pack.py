"""`edgekv pack`: documents prefilled once, and what it loses to put several behind each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json, print_table
from edgekv.cli.common.progress import stages

if TYPE_CHECKING:
    from edgekv.workflows.pack import PackCheck, PackResult


@options.command("pack")
@click.argument("files", type=options.PATH, nargs=-1, required=True)
@click.option(
    "-m", "--model", type=options.LOADED_MODEL, required=True, help="The model that will read them."
)
@options.output("The pack.", required=False)
@click.option("--check", is_flag=True, help="FILES are packs: measure what they lose behind each other.")
@click.option("-q", "--question", help="--check: what is asked.  [default: to sum them up]")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=64, show_default=True,
              help="--check: tokens of the answer that is compared.")  # fmt: skip
@click.option("--heads", type=click.IntRange(0), multiple=True, metavar="N",
              help="--check: first tokens of later packs to compute anew; repeatable.  [default: 0, 16]")  # fmt: skip
@options.cache_type("How keys and values are stored, in the pack and in chats.  [default: f16]")
@options.ctx_size("Tokens of context.  [default: enough]")
@click.option("--no-template", "template", flag_value=False, default=True, type=bool,
              help="For chats without the model's chat template.")  # fmt: skip
@options.threads()
@options.backend()
@options.kernel()
@options.force()
@options.as_json()
def command(
    files: tuple[Path, ...],
    output: Path | None,
    check: bool,
    question: str | None,
    max_tokens: int,
    heads: tuple[int, ...],
    cache_type: str | None,
    force: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Prefill text FILES once; chats then begin with them at once.

    \b
    edgekv pack manual.txt faq.txt -m small.gguf -o docs.pack --cache-type q4_0
    edgekv chat small.gguf --pack docs.pack -p "How is it cleaned?"
    edgekv pack --check docs.pack news.pack -m small.gguf      what two of them lose

    With a latent model (`edgekv convert`) several packs can stand behind each other in any order; with another,
    a pack is an exact beginning and stands alone.
    """
    from edgekv.workflows.pack import CheckPacksRequest, PackRequest, check_packs, pack_documents

    if check:
        wanted |= {name: value for name, value in (("question", question), ("heads", heads)) if value}
        request = CheckPacksRequest(packs=files, max_tokens=max_tokens, **wanted)
        found = check_packs(request, stages(quiet=as_json))
        print_json(asdict(found)) if as_json else _show_check(found)
        return
    if output is None:
        raise click.UsageError("name the pack to write with -o, or pass --check to compare packs")
    result = pack_documents(
        PackRequest(files, output=output, cache_type=cache_type, force=force, **wanted), stages(quiet=as_json)
    )
    if as_json:
        print_json({**asdict(result), "output": str(result.output)})
    else:
        _show(result)


def _show(result: PackResult) -> None:
    click.echo(
        f"wrote {result.output}: {result.n_tokens:,} tokens, {result.rows_nbytes / 1e6:.1f} MB in the cache, "
        f"{result.nbytes / 1e6:.1f} MB on disk"
    )
    if not result.movable:
        click.echo("this model caches keys and values: the pack stands alone, at the beginning", err=True)


def _show_check(found: PackCheck) -> None:
    click.echo(
        f"{found.n_documents:,} tokens of documents, {found.n_prompt:,} of prompt; first token after "
        f"{found.first_token_s:.2f} s by one prefill"
    )
    print_table(
        ("computed anew", "KL per token", "largest", "same token", "first token", "sooner"),
        (
            (
                f"{loss.heads} of each later pack",
                f"{loss.kl:.4f}",
                f"{loss.kl_max:.4f}",
                f"{loss.same:.0%}",
                f"{loss.first_token_s:.2f} s",
                f"{found.first_token_s / loss.first_token_s:.0f}x",
            )
            for loss in found.losses
        ),
    )
