"""The ONNX graphs against the NumPy reference and llama.cpp, and the folder as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekv.backends.onnxruntime import OnnxBackend
from edgekv.backends.open import open_backend
from edgekv.backends.reference import ReferenceBackend
from edgekv.devices.predict.model_info import describe_onnx
from edgekv.errors import OutputError, UnsupportedError
from edgekv.evaluate.verify import Comparison, compare
from edgekv.export.gguf.write import write_gguf
from edgekv.export.onnx.weights import LatentCache, Weights, quantize_blocks
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.gguf.header import read_header
from edgekv.models.onnx.folder import DATA, GRAPH, MANIFEST, VOCABULARY
from edgekv.models.onnx.manifest import WINDOW_SLACK, read_manifest
from edgekv.models.open import open_model
from edgekv.source import LazySource, TensorSource
from edgekv.spec import MLA, LayerSpec, RopeSpec, Yarn
from edgekv.tensors import block_tensor_shapes
from edgekv.tokenizer.tokenizer import Tokenizer

TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 250, 200)]
ACTIVATIONS_KL = (
    0.01  # what activations in 8 bits cost these models: random ones are far touchier than trained
)


def export(source: TensorSource, folder: Path, weights: Weights = "f32", cache: LatentCache = "f32") -> Path:
    write_onnx(source, folder, OnnxOptions(weights, cache), False, lambda done, total: None)
    return folder


def against_reference(source: TensorSource, folder: Path) -> Comparison:
    engine = OnnxBackend(folder, n_ctx=256, n_threads=1)
    try:
        return compare(ReferenceBackend(source, 256), engine, TOKENS, lambda done, total: None)
    finally:
        engine.close()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_f32_equals_the_reference(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = open_model(request.getfixturevalue(model))
    found = against_reference(source, export(source, tmp_path / "out"))
    assert abs(found.kl) < 1e-6
    assert found.max_logit_error < 1e-4
    assert found.argmax_agreement == 1


def test_a_real_model_says_the_same(smollm2: Path, tmp_path: Path) -> None:
    """KL against the reference on what SmolLM2 says itself, and its greedy text token by token."""
    source = open_model(smollm2)
    reference = ReferenceBackend(source, 64)
    engine = OnnxBackend(export(source, tmp_path / "out"), n_ctx=64, n_threads=1)
    prompt = Tokenizer.from_metadata(source.metadata).encode("The capital of France is")
    logits, said = engine.prefill(prompt), []
    for _ in range(12):
        said.append(int(logits.argmax()))
        logits = engine.decode(said[-1])
    engine.trim(0)
    found = compare(reference, engine, prompt + said, lambda done, total: None)
    assert abs(found.kl) < 1e-6
    reference.trim(len(prompt) - 1)
    following = reference.prefill_all([prompt[-1], *said[:-1]]).argmax(-1)
    assert following.tolist() == said
    engine.close()


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_mqa_mha_and_an_untied_head(
    kv_heads: int, make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    source = make_llama(n_kv_heads=kv_heads, tied=False)
    assert abs(against_reference(source, export(source, tmp_path / "out")).kl) < 1e-6


def varied(source: TensorSource, ffn: str = "swiglu", **attention: object) -> LazySource:
    """A model like the source but for its attention's and its feed-forward's kind."""
    plain = source.spec.layers[0]
    layer = replace(plain, ffn=ffn, attention=replace(plain.attention, **attention))
    return of_layers(source, (layer,) * source.spec.n_layers)


def of_layers(source: TensorSource, layers: tuple[LayerSpec, ...]) -> LazySource:
    """A model like the source but for its layers; tensors that these have on top are random."""
    out = LazySource(replace(source.spec, layers=layers), source.metadata)
    for name in source.names():
        out.borrow(source, name)
    rng = np.random.default_rng(9)
    for i, layer in enumerate(layers):
        for name, shape in block_tensor_shapes(layer, out.spec.dim).items():
            if f"blk.{i}.{name}" not in out.names():
                out.add_array(f"blk.{i}.{name}", rng.standard_normal(shape).astype(np.float32))
    return out


@pytest.mark.parametrize(
    "kind",
    [
        {"bias": True},
        {"qk_norm": True},
        {"window": 40},
        {"softcap": 5.0},
        {"scale": 0.1},
        {"rope": RopeSpec(10000.0, 32, "half", factors=tuple(np.linspace(1, 4, 16)), magnitude=1.2)},
        {"rope": RopeSpec(10000.0, 32, yarn=Yarn(4.0, 64))},
        {"ffn": "geglu"},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_kinds_of_attention(
    kind: dict[str, object], make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    source = varied(make_llama(), **kind)
    assert source.spec.peculiarities
    assert abs(against_reference(source, export(source, tmp_path / "out")).kl) < 1e-6


def test_mla_with_yarn(tiny_mla: Path, tmp_path: Path) -> None:
    rope = RopeSpec(10000.0, 32, yarn=Yarn(4.0, 64), magnitude=1.1)
    source = varied(open_model(tiny_mla), rope=rope, scale=0.2)
    assert abs(against_reference(source, export(source, tmp_path / "out")).kl) < 1e-6


def test_layers_that_differ(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    """A norm of heads, a window, no positions; norms behind, scales and a cap of the whole model."""
    plain = make_llama().spec.layers[0]
    gqa = plain.attention
    layers = (
        replace(
            plain, attention=replace(gqa, qk_norm=True, rope=RopeSpec(500.0, 32, "half")), post_norms=True
        ),
        replace(plain, attention=replace(gqa, window=40, softcap=5.0), ffn="geglu"),
        replace(plain, attention=replace(gqa, rope=replace(gqa.rope, dim=0))),
    )
    source = of_layers(make_llama(), layers)
    source.spec = replace(
        source.spec, logit_softcap=3.0, residual_scale=0.7, embedding_scale=2.0, logit_scale=0.5
    )
    folder = export(source, tmp_path / "out")
    assert abs(against_reference(source, folder).kl) < 1e-6
    about = read_manifest(folder).model
    assert [layer.window for layer in about.layers] == [0, 40, 0]
    assert [layer.slots(256) for layer in about.layers] == [256, 40 + WINDOW_SLACK, 256]
    assert sum(layer.nbytes for layer in about.layers) == about.cache_nbytes
    assert about.cache_nbytes == source.spec.kv_bytes_per_token("f32")
    cache = describe_onnx(read_manifest(folder), folder, 256)[1]
    assert (cache.window, cache.window_nbytes_per_token) == (40, about.cache_nbytes // 3)


def test_native_mla_keeps_its_latent(native_mla: Path, tmp_path: Path) -> None:
    """MiniCPM3 and PLM equal llama.cpp, whose cache holds every head's keys and values."""
    folder = export(open_model(native_mla), tmp_path / "out")
    theirs = open_backend(native_mla, "llama.cpp", n_ctx=256, cache_type="f32", n_threads=1)
    ours = OnnxBackend(folder, n_ctx=256, n_threads=1)
    found = compare(theirs, ours, TOKENS, lambda done, total: None)
    assert abs(found.kl) < 1e-5
    assert found.argmax_agreement > 0.99
    assert theirs.cache_nbytes() == 4 * ours.cache_nbytes()
    assert ours.cache_nbytes() == 256 * 3 * (64 + 32) * 4
    theirs.close()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_those_of_the_block_format(
    model: str, weights: Weights, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The graph computes with the rounded weights: what is left is activations rounded to 8 bits."""
    source = open_model(request.getfixturevalue(model))
    folder = export(source, tmp_path / "out", weights)
    rounded = rounded_source(source, 8 if weights == "int8" else 4)
    found = against_reference(rounded, folder)
    assert found.kl < ACTIVATIONS_KL
    if weights == "int4":
        assert found.kl < against_reference(source, folder).kl / 10


def rounded_source(source: TensorSource, bits: int) -> LazySource:
    """The source with its matrices rounded as the export does."""
    out = LazySource(source.spec, source.metadata)
    for name in source.names():
        array = source.load(name)
        keeps_8 = name in ("token_embd.weight", "output.weight") or "attn_kv_a_mqa" in name
        if array.ndim == 2:
            array = unpack(array, 8 if keeps_8 else bits)
        out.add_array(name, array)
    for i, layer in enumerate(source.spec.layers):
        mla = layer.attention
        if isinstance(mla, MLA) and mla.kv_lora_rank <= mla.value_dim:
            # v_b is multiplied into the output matrix, whose product is rounded.
            w_o = source.load(f"blk.{i}.attn_output.weight").reshape(-1, mla.n_heads, mla.value_dim)
            folded = np.einsum("dhv,hvr->dhr", w_o, source.load(f"blk.{i}.attn_v_b.weight"))
            rounded = unpack(folded.reshape(len(w_o), -1), bits).reshape(folded.shape)
            wide = np.pad(rounded, ((0, 0), (0, 0), (0, mla.value_dim - mla.kv_lora_rank)))
            out.add_array(f"blk.{i}.attn_output.weight", wide.reshape(len(w_o), -1))
            eye = np.eye(mla.value_dim, mla.kv_lora_rank, dtype=np.float32)
            out.add_array(f"blk.{i}.attn_v_b.weight", np.stack([eye] * mla.n_heads))
    return out


def unpack(matrix: np.ndarray, bits: int) -> np.ndarray:
    blocks = quantize_blocks(matrix, bits)
    codes = blocks.packed
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], 32)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * blocks.scales[..., None]
    return values.reshape(len(matrix), -1)[:, : matrix.shape[1]]


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_round_to_the_nearest_code(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 80)).astype(np.float32)
    blocks = quantize_blocks(matrix, bits)
    assert blocks.packed.shape == (5, 3, 4 * bits)
    padded = np.pad(matrix, ((0, 0), (0, 16))).reshape(5, 3, 32)
    error = np.abs(np.pad(unpack(matrix, bits), ((0, 0), (0, 16))).reshape(5, 3, 32) - padded)
    step = np.abs(blocks.scales)[..., None]
    inside = padded / blocks.scales[..., None] <= (1 << (bits - 1)) - 1
    assert (error[inside] <= (step * 0.5001 + np.zeros_like(error))[inside]).all()
    assert (error <= step * 1.0001).all()  # the far end of the other sign may be clipped by one code


def test_what_is_written(tiny_mla: Path, tmp_path: Path) -> None:
    folder = export(open_model(tiny_mla), tmp_path / "out", "int4")
    manifest = read_manifest(folder)
    assert set(manifest.files) | {MANIFEST} == {path.name for path in folder.iterdir()}
    onnx.checker.check_model(str(folder / GRAPH), full_check=False)
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    names = [value.name for value in graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert "past_key_values.2.key" in names
    assert {"logits", "present.0.key"} <= {value.name for value in graph.output}
    contrib = {node.op_type for node in graph.node if node.domain}
    assert contrib == set(manifest.onnxruntime_operators)
    about = manifest.model
    assert (about.attention, about.cache_values, about.cache_nbytes) == ("MLA", 3 * 64, 3 * 64 * 4)
    tokens = read_header(folder / VOCABULARY).metadata["tokenizer.ggml.tokens"]
    assert tokens == read_header(tiny_mla).metadata["tokenizer.ggml.tokens"]


def test_a_tied_table_is_stored_once(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source = make_llama(filler=4000)
    for weights, bits in (("f32", 32), ("int4", 9)):  # 8 bits and a scale for 32 of them
        size = (export(source, tmp_path / weights, weights) / DATA).stat().st_size
        table = source.spec.vocab * source.spec.dim * bits / 8
        assert table < size < 2 * table


def test_nothing_is_left_of_a_failed_export(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    source = make_llama()
    source.add("blk.2.ffn_up.weight", (96, 64), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_exports_are_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    source, folder = open_model(tiny_llama), tmp_path / "out"
    export(source, folder)
    with pytest.raises(OutputError, match="--force"):
        export(source, folder)
    write_onnx(source, folder, OnnxOptions("int8"), True, lambda done, total: None)
    assert read_manifest(folder).model.weights == "int8"
    assert list(tmp_path.iterdir()) == [folder]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").touch()
    with pytest.raises(OutputError, match="something else"):
        write_onnx(source, photos, OnnxOptions(), True, lambda done, total: None)
    assert (photos / "1.jpg").exists()
    with pytest.raises(OutputError, match="mkdir"):
        export(source, tmp_path / "no" / "out")


def test_an_8_bit_cache_is_for_latents(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="edgekv convert` first"):
        export(open_model(tiny_llama), tmp_path / "out", cache="int8")


def test_quantized_weights_want_a_width_of_whole_blocks(
    make_llama: Callable[..., LazySource], tmp_path: Path
) -> None:
    source = make_llama()
    source.spec = replace(source.spec, dim=80)
    with pytest.raises(UnsupportedError, match="a width of 80 does not divide into blocks of 32"):
        export(source, tmp_path / "out", "int8")


def test_a_table_of_turns_is_read_by_the_row(make_llama: Callable[..., LazySource], tmp_path: Path) -> None:
    """Two layers share one, and the layer whose heads are normed needs none."""
    plain = make_llama().spec.layers[0]
    normed = replace(plain, attention=replace(plain.attention, qk_norm=True))
    about = read_manifest(export(of_layers(make_llama(), (plain, normed, plain)), tmp_path / "out")).model
    assert about.weights_nbytes - about.read_nbytes == 512 * 32 * 4
    tables = [t for t in onnx.load(tmp_path / "out" / GRAPH).graph.initializer if t.name.startswith("rope")]
    assert [(t.name, tuple(t.dims)) for t in tables] == [("rope.cos", (512, 16)), ("rope.sin", (512, 16))]


def test_int8_latents_lose_little(tiny_mla: Path, native_mla: Path, tmp_path: Path) -> None:
    for i, path in enumerate((tiny_mla, native_mla)):
        source = open_model(path)
        found = against_reference(source, export(source, tmp_path / str(i), cache="int8"))
        assert 1e-8 < found.kl < 5e-3


def test_weights_that_are_written_again_are_equal(tiny_llama: Path, tmp_path: Path) -> None:
    """Two exports of one model are the same files: nothing depends on time or order."""
    source = open_model(tiny_llama)
    copy = tmp_path / "copy.gguf"
    write_gguf(source, copy, "f32", {}, False, lambda *_: None)
    first, second = export(source, tmp_path / "a"), export(open_model(copy), tmp_path / "b")
    for name in (GRAPH, DATA):
        assert (first / name).read_bytes() == (second / name).read_bytes()
