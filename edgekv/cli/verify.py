"""`edgekv verify`: a comparison of two models or two engines on the same tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.output import print_json
from edgekv.cli.common.progress import stages
from edgekv.errors import ToleranceError

if TYPE_CHECKING:
    from edgekv.evaluate.verify import Comparison


@options.command("verify")
@click.argument("a", type=options.LOADED_MODEL)
@click.argument("b", type=options.LOADED_MODEL, required=False)
@options.backend("Engine of A.", "--backend-a", "reference")
@options.backend("Engine of B.  [default: the one for B's format]", "--backend-b")
@options.cache_type("llama.cpp's cache type.", default="f32")
@options.kernel()
@options.text("Text to compare on.  [default: text that the model samples itself]")
@options.text_tokens(256, "Tokens to compare on.")
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest mean KL, in nats per token.")
@options.as_json()
def command(tolerance: float, as_json: bool, **wanted: Any) -> None:
    """Compare two models, or one model in two engines; exit 1 past the tolerance.

    \b
    edgekv verify small.gguf --tolerance 0.01          llama.cpp against the NumPy reference; weights of 4 bits
    edgekv verify model.gguf small.gguf --backend-a llama.cpp --tolerance 0.1
    edgekv verify model.gguf model-onnx --tolerance 1e-6      an export with --weights f32
    """
    from edgekv.workflows.verify import VerifyRequest, verify_models

    found = verify_models(VerifyRequest(**wanted), stages(quiet=as_json))
    if as_json:
        print_json({**asdict(found), "tolerance": tolerance})
    else:
        _show(found)
    if not found.kl <= tolerance:
        raise ToleranceError(f"KL {found.kl:.3g} is past the tolerance {tolerance:g}")


def _show(found: Comparison) -> None:
    click.echo(f"tokens            {found.tokens}")
    click.echo(
        f"KL(A || B)        {found.kl:.3e} ± {found.kl_se:.0e} nats per token, at most {found.kl_max:.3e}"
    )
    click.echo(f"max logit error   {found.max_logit_error:.3e}")
    click.echo(f"argmax agreement  {found.argmax_agreement:.2%}")
    click.echo(f"attention         {'EdgeKV kernel' if found.kernel == 'edgekv' else 'stock'} (llama.cpp)")
    click.echo(f"perplexity        {found.ppl_a:.4f} (A)  {found.ppl_b:.4f} (B)")
