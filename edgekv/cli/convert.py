"""`edgekv convert`: a GQA model becomes an MLA GGUF."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common.bar import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekv.convert.layers import LayerLoss
    from edgekv.evaluate.verify import Comparison
    from edgekv.source import TensorSource
    from edgekv.spec import Metadata, MetaValue

PATH = click.Path(path_type=Path)
WEIGHTS = ("keep", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
VERIFY_TOKENS = 256


@click.command("convert")
@click.argument("model", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="The GGUF to write.")
@click.option("--target", type=float, help="Share of the cache to keep, e.g. 0.5; picks SIMD-friendly sizes.")
@click.option("--kv-lora-rank", type=int, help="Width of the latent, instead of --target.")
@click.option("--rope-dim", type=int, help="Width of the shared rope key.  [default: the head dim]")
@click.option("--nope-dim", type=int, help="Query dims a head that read the latent.  [default: 32]")
@click.option("--value-dim", type=int, help="Value dims a head.  [default: the head dim]")
@click.option("--method", default="edgekv", show_default=True, type=click.Choice(["edgekv", "transmla"]),
              help="Training-free method; transmla is the published one, for comparison.")  # fmt: skip
@click.option("--fold-biases", is_flag=True,
              help="Convert a model with biases (Qwen2): write them into the weights, nearly.")  # fmt: skip
@click.option("--healed", type=PATH, help="File of `edgekv heal` to build from, instead of fitting.")
@click.option("--weights", default="keep", show_default=True, type=click.Choice(WEIGHTS),
              help="Weight format; keep leaves untouched tensors as they are and writes new ones in q8_0.")  # fmt: skip
@click.option("--calib", multiple=True, type=PATH, help="Calibration text.  [default: the model writes it]")
@click.option("--calib-tokens", default=32768, show_default=True, help="Tokens to calibrate on.")
@click.option(
    "--seed", default=0, type=click.IntRange(min=0), show_default=True, help="Of the calibration sample."
)
@click.option("--verify", is_flag=True, help="Reload in llama.cpp and compare with the NumPy reference.")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path, output: Path, as_json: bool, verify: bool, force: bool, **options: Any) -> None:
    """Convert a GQA or MHA model into one whose cache is a compressed latent.

    The outcome is a `deepseek2` GGUF that unmodified llama.cpp runs.

    \b
    edgekv convert model.gguf -o half.gguf --target 0.5
    edgekv convert model.gguf -o third.gguf --kv-lora-rank 64 --rope-dim 64 --calib book.txt
    edgekv convert model.gguf -o third.gguf --healed third.safetensors --verify
    """
    from edgekv.export.gguf.write import write_gguf
    from edgekv.files import check_output
    from edgekv.models.open import open_source
    from edgekv.rewrite.value_scales import with_balanced_values

    check_output(output, force)
    source = open_source(model)
    losses: list[LayerLoss] = []
    with tempfile.TemporaryDirectory(prefix="edgekv-convert-") as spill:
        converted, notes = _converted(source, Path(spill), losses, as_json, options)
        converted = with_balanced_values(converted)
        with progress("writing", as_json) as advance:
            write_gguf(converted, output, options["weights"], notes, force, advance)
    comparison = verify_file(output, as_json) if verify else None
    _report(source, converted, output, notes, losses, comparison, as_json)
    if comparison is not None and comparison.kl > VERIFY_KL[options["weights"]]:
        from edgekv.errors import ToleranceError

        raise ToleranceError(
            f"{output}: llama.cpp differs from the NumPy reference by KL {comparison.kl:.2e}; please report this"
        )


# What llama.cpp's own arithmetic costs beside float32: it multiplies quantized weights by 8-bit activations.
VERIFY_KL = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3} | dict.fromkeys((*WEIGHTS[4:], "keep"), 2e-2)


def _converted(
    source: TensorSource, spill: Path, losses: list[LayerLoss], as_json: bool, options: dict[str, Any]
) -> tuple[TensorSource, Metadata]:
    """The converted source, from healed weights or by fitting, and the notes on how it was made."""
    from edgekv.convert.layers import METHODS, convert, convertible_attention
    from edgekv.convert.target import resolve_target
    from edgekv.errors import InputError
    from edgekv.rewrite.rope_pairs import with_interleaved_pairs
    from edgekv.text.windows import WINDOW

    if options["healed"]:
        convertible_attention(source.spec)
        return _from_healed(source, options, as_json)
    source = with_interleaved_pairs(source)
    gqa = convertible_attention(source.spec, options["fold_biases"])
    sizes = ("target", "kv_lora_rank", "rope_dim", "nope_dim", "value_dim")
    target = resolve_target(gqa, *(options[name] for name in sizes))
    recipe = METHODS[options["method"]]
    if target.value_dim != gqa.head_dim and not recipe.refit_output:
        raise InputError(
            f"--value-dim {target.value_dim} needs a method that refits the outputs; leave it out, or use "
            "--method edgekv"
        )
    windows = _calibration(source, options, options["calib_tokens"], WINDOW, as_json)
    with progress("converting", as_json) as advance:

        def layer_done(loss: LayerLoss) -> None:
            losses.append(loss)
            advance(loss.layer + 1, source.spec.n_layers)

        converted = convert(source, target, windows, spill, recipe, layer_done)
    notes: dict[str, MetaValue] = {
        "edgekv.method": options["method"],
        "edgekv.calibration": ", ".join(path.name for path in options["calib"]) or "sampled from the model",
        "edgekv.calibration_tokens": int(windows.size),
        "edgekv.seed": options["seed"],
        "edgekv.source_cache_values": source.spec.cache_values,
        "edgekv.output_error": [round(loss.output_error, 5) for loss in losses],
    }
    if gqa.bias:
        notes["edgekv.bias_error"] = [round(loss.bias_error, 5) for loss in losses]
    return converted, notes


def _from_healed(
    source: TensorSource, options: dict[str, Any], as_json: bool
) -> tuple[TensorSource, Metadata]:
    """The original with healed weights, in the basis in which a quantized cache loses least."""
    from edgekv.heal.basis import BASIS_TOKENS, BASIS_WINDOW, in_best_basis
    from edgekv.heal.weights import check_base, healed_source, read_healed

    record, tensors = read_healed(options["healed"])
    check_base(options["healed"], record, source)
    n_tokens = min(options["calib_tokens"], BASIS_TOKENS)
    windows = _calibration(source, options, n_tokens, BASIS_WINDOW, as_json)
    with progress("choosing the basis of the cache", as_json) as advance:
        tensors = in_best_basis(source, record.attention, tensors, windows, advance)
    last = record.evaluations[-1]
    notes: Metadata = {
        "edgekv.method": "healed",
        "edgekv.healed_tokens": record.tokens_seen,
        "edgekv.healed_on": ", ".join(data.name for data in record.data),
        "edgekv.healed_for_cache": record.recipe.cache_type,
        "edgekv.healed_kl": round(last.kl, 5),
        "edgekv.healed_kl_text": record.evaluation_text,
        "edgekv.source_cache_values": source.spec.cache_values,
    }
    return healed_source(source, record.attention, tensors), notes


def _calibration(
    source: TensorSource, options: dict[str, Any], n_tokens: int, written: int, as_json: bool
) -> NDArray[np.int64]:
    """Windows of the text that was given, or of text that the model writes, then of `written` tokens each."""
    from edgekv.errors import InputError
    from edgekv.text.windows import windows_from_files, windows_from_model
    from edgekv.tokenizer.tokenizer import Tokenizer

    if n_tokens < 1:
        raise InputError("--calib-tokens takes a positive number")
    if options["calib"]:
        tokenizer = Tokenizer.from_metadata(source.metadata)
        return windows_from_files(list(options["calib"]), tokenizer, n_tokens, options["seed"])
    with progress("sampling calibration text", as_json) as advance:
        return windows_from_model(source, n_tokens, options["seed"], advance, written)


def verify_file(path: Path, quiet: bool) -> Comparison:
    """Reload a written file in llama.cpp with a float32 cache and compare it with the reference."""
    from edgekv.backends.open import open_backend
    from edgekv.backends.reference import ReferenceBackend
    from edgekv.evaluate.verify import compare, sample_tokens
    from edgekv.models.open import open_source

    reference = ReferenceBackend(open_source(path), VERIFY_TOKENS)
    tokens = sample_tokens(reference, VERIFY_TOKENS, seed=1)
    engine = open_backend(path, "llama.cpp", n_ctx=VERIFY_TOKENS, cache_type="f32")
    try:
        with progress("verifying", quiet) as advance:
            return compare(reference, engine, tokens, advance)
    finally:
        engine.close()


def _report(
    source: TensorSource,
    converted: TensorSource,
    output: Path,
    notes: Metadata,
    losses: list[LayerLoss],
    comparison: Comparison | None,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    before, after = source.spec.kv_bytes_per_token("f16"), converted.spec.kv_bytes_per_token("f16")
    if as_json:
        document = {
            "output": str(output),
            "bytes": output.stat().st_size,
            "cache_bytes_per_token": {"before": before, "after": after},
            "notes": dict(notes),
            "layers": [asdict(loss) for loss in losses],
            "verify": asdict(comparison) if comparison else None,
        }
        click.echo(json.dumps(document, indent=1))
        return
    if losses:
        _loss_table(losses)
    click.echo(f"cache: {before:,} -> {after:,} bytes a token in f16 ({after / before - 1:+.1%})")
    if comparison:
        click.echo(
            f"llama.cpp against the reference on {comparison.tokens} tokens: KL {comparison.kl:.2e}, "
            f"max logit error {comparison.max_logit_error:.2e}, argmax {comparison.argmax_agreement:.1%}"
        )
    click.echo(f"wrote {output} ({output.stat().st_size / 2**20:,.1f} MiB)")


def _loss_table(losses: list[LayerLoss]) -> None:
    from rich.console import Console
    from rich.table import Table

    biased = any(loss.bias_error for loss in losses)
    table = Table("layer", "rope key keeps", "latent keeps", "output error", *["bias error"] * biased)
    for loss in losses:
        cells = f"{loss.rope_kept:.1%}", f"{loss.latent_kept:.1%}", f"{loss.output_error:.3f}"
        table.add_row(str(loss.layer), *cells, *[f"{loss.bias_error:.1%}"] * biased)
    Console().print(table)
    curve = {
        rank: sum(x.latent_kept_at[rank] for x in losses) / len(losses) for rank in losses[0].latent_kept_at
    }
    if curve:
        Console().print(
            "a latent of rank r keeps, over all layers:", ", ".join(f"{r} {s:.1%}" for r, s in curve.items())
        )
