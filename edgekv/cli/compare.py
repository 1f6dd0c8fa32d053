"""`edgekv compare`: reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from edgekv.cli.common import options
from edgekv.files import atomic_path


@options.command("compare")
@click.argument("reports", nargs=-1, required=True, metavar="REPORT...", type=options.PATH)
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown tables.")
@click.option("--json", "form", flag_value="json", help="Print all runs and warnings as JSON.")
@click.option("--html", type=options.PATH, help="Write a page with charts here.")
@click.option("--svg", type=options.PATH, help="Draw all runs as one picture here (needs matplotlib).")
@options.force("Replace what exists.")
def command(
    reports: tuple[Path, ...], form: str | None, html: Path | None, svg: Path | None, force: bool
) -> None:
    """Compare reports of `edgekv bench` or `llama-bench -o json`, from any machines.

    Prints speed, memory and where each figure comes from. The page holds charts as well; it is one file
    that needs no network. Measured, emulated and projected figures are marked as such.

    \b
    edgekv compare run.json
    edgekv compare pi5.json pi4.json --html boards.html --svg boards.svg
    edgekv compare run.json llama-bench.json --markdown >> notes.md
    """
    from edgekv.devices.reporting import compare, page, picture

    sources = compare.load_sources(reports)
    if html is not None:
        with atomic_path(html, force) as partial:
            partial.write_text(page.html_page(sources), encoding="utf-8")
        click.echo(f"page: {html}", err=True)
    if svg is not None:
        with atomic_path(svg, force) as partial:
            picture.write_svg(lambda: picture.comparison_figure(sources), partial)
        click.echo(f"picture: {svg}", err=True)
    if form == "json":
        click.echo(compare.as_json(sources))
    elif form == "markdown":
        click.echo(compare.as_document(sources))
    else:
        click.echo(compare.as_terminal(sources))
