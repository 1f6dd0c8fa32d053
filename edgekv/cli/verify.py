"""`edgekv verify`: the same tokens through two models or two engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.backends.open import KINDS
from edgekv.cli.common.bar import progress

if TYPE_CHECKING:
    from edgekv.evaluate.verify import Comparison

PATH = click.Path(path_type=Path)
BACKENDS = click.Choice(KINDS)


@click.command("verify")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH, required=False)
@click.option("--backend-a", default="reference", show_default=True, type=BACKENDS, help="Engine of A.")
@click.option("--backend-b", type=BACKENDS, help="Engine of B.  [default: what B is made for]")
@click.option("--cache-type", default="f32", show_default=True, help="llama.cpp's cache type.")
@click.option("--text", type=PATH, help="Text to compare on.  [default: text that A samples itself]")
@click.option("--tokens", default=256, show_default=True, help="Tokens to compare on.")
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest mean KL, in nats a token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    a: Path,
    b: Path | None,
    backend_a: str,
    backend_b: str | None,
    cache_type: str,
    text: Path | None,
    tokens: int,
    tolerance: float,
    as_json: bool,
) -> None:
    """Compare two models, or one model in two engines; exit 1 past the tolerance.

    \b
    edgekv verify small.gguf                           llama.cpp against the NumPy reference
    edgekv verify model.gguf small.gguf --backend-a llama.cpp --tolerance 0.1
    edgekv verify model.gguf model-onnx --tolerance 1e-6
    """
    from dataclasses import asdict

    from edgekv.errors import InputError, ToleranceError
    from edgekv.evaluate.verify import compare, sample_tokens

    if tokens < 2:
        raise InputError("--tokens takes a number of 2 or more; 256 is the default")
    engine_a = _open(a, backend_a, tokens, cache_type)
    engine_b = _open(b or a, backend_b, tokens, cache_type)
    try:
        if engine_a.n_vocab != engine_b.n_vocab:
            raise InputError(
                f"the vocabularies differ: {a} has {engine_a.n_vocab} tokens, {b} has {engine_b.n_vocab}; "
                "compare models of one family"
            )
        given = _read(text, a, tokens) if text else sample_tokens(engine_a, tokens, seed=1)
        with progress("comparing", as_json) as advance:
            found = compare(engine_a, engine_b, given, advance)
    finally:
        engine_a.close()
        engine_b.close()
    if as_json:
        click.echo(json.dumps({**asdict(found), "tolerance": tolerance}, indent=1))
    else:
        _show(found)
    if not found.kl <= tolerance:
        raise ToleranceError(f"KL {found.kl:.3g} is past the tolerance {tolerance:g}")


def _open(path: Path, backend: Any, n_ctx: int, cache_type: str) -> Any:
    from edgekv.backends.open import default_kind, open_backend

    backend = backend or default_kind(path)
    return open_backend(path, backend, n_ctx=n_ctx, cache_type=cache_type if backend == "llama.cpp" else None)


def _read(text: Path, model: Path, tokens: int) -> list[int]:
    from edgekv.errors import InputError
    from edgekv.models.gguf.header import read_header
    from edgekv.models.onnx.manifest import language_file
    from edgekv.tokenizer.tokenizer import Tokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--text {text} cannot be read as UTF-8 text: {error}; give a plain text file"
        ) from error
    ids = Tokenizer.from_metadata(read_header(language_file(model)).metadata).encode(content)[:tokens]
    if len(ids) < 2:
        raise InputError(f"--text {text} holds {len(ids)} tokens, at least 2 are needed; give a longer text")
    return ids


def _show(found: Comparison) -> None:
    click.echo(f"tokens            {found.tokens}")
    click.echo(
        f"KL(A || B)        {found.kl:.3e} ± {found.kl_se:.0e} nats a token, at most {found.kl_max:.3e}"
    )
    click.echo(f"max logit error   {found.max_logit_error:.3e}")
    click.echo(f"argmax agreement  {found.argmax_agreement:.2%}")
    click.echo(f"perplexity        {found.ppl_a:.4f} (A)  {found.ppl_b:.4f} (B)")
