"""Export in DeepseekV3 format, against transformers itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edgekv.chat.template import ChatTemplate
from edgekv.convert.encoded.layers import EncodedTarget, convert_encoded
from edgekv.errors import InputError, OutputError, UnsupportedError
from edgekv.export.deepseek.safetensors_file import LazyTensor, write_safetensors
from edgekv.export.deepseek.tensors import TORCH_NAMES
from edgekv.export.deepseek.write import write_deepseek
from edgekv.export.tokenizer_json import tokenizer_json
from edgekv.models.open import open_model
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax
from edgekv.source import Array, LazySource, TensorSource
from edgekv.spec import MLA, LayerSpec, Metadata, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER
from edgekv.tokenizer.tokenizer import Tokenizer

TOKENS = np.random.default_rng(3).integers(0, 256, 48).tolist()


def low_rank_queries() -> LazySource:
    """A dense MLA with a query bottleneck and norms that are no identities, as DeepSeek trains them."""
    attention = MLA(4, 32, 16, 24, RopeSpec(10000.0, 16), q_lora_rank=24)
    spec = ModelSpec("deepseek2", "tiny", (LayerSpec(attention, 96),) * 2, 64, 260, 512, 1e-3, False)
    rng = np.random.default_rng(1)
    letters = [*BYTE_OF_LETTER, "ab", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [1] * 257 + [3] * 3,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 258,
    }
    source = LazySource(spec, metadata)
    shapes = {"token_embd.weight": (260, 64), "output_norm.weight": (64,), "output.weight": (260, 64)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": s for name, s in layer_tensor_shapes(attention, 64, 96).items()}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape) * 0.2 + ("norm" in name)
        source.add_array(name, noise.astype(np.float32))
    return source


def export(source: TensorSource, folder: Path, dtype: Any = "f32") -> Path:
    write_deepseek(source, folder, dtype, False, lambda done, total: None)
    return folder


def reference_logits(source: TensorSource) -> Array:
    model = ReferenceModel(source)
    return model.logits(model.hidden(TOKENS, model.new_cache(len(TOKENS))))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    return model


def difference(source: TensorSource, folder: Path) -> tuple[float, float]:
    """Largest logit error and mean KL of transformers against the reference."""
    ours = reference_logits(source)
    with torch.no_grad():
        theirs = load(folder)(torch.tensor([TOKENS])).logits[0].float().numpy()
    assert np.isfinite(theirs).all()
    log_ours, log_theirs = log_softmax(ours), log_softmax(theirs)
    kl = (np.exp(log_ours) * (log_ours - log_theirs)).sum(-1).mean()
    return float(np.abs(ours - theirs).max()), float(kl)


@pytest.fixture(scope="module")
def converted(
    make_llama: Callable[..., LazySource], make_mla: Callable[..., TensorSource]
) -> Callable[[bool], TensorSource]:
    return lambda tied: make_mla(make_llama(tied=tied), 32, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_converted_model(
    converted: Callable[[bool], TensorSource], tied: bool, tmp_path: Path
) -> None:
    source = converted(tied)
    error, kl = difference(source, export(source, tmp_path / "out"))
    assert error < 1e-3
    assert kl < 1e-6


@pytest.fixture(scope="module")
def make_encoded(
    make_llama: Callable[..., LazySource], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TensorSource]:
    """Converts a model with large biases, as Qwen2.5 has: (rope, traits) -> source of encoded latents."""

    def make(rope: RopeSpec, width: int = 96, rope_dim: int | None = 32, **traits: Any) -> TensorSource:
        plain = make_llama(bias=True, **traits)
        layers = tuple(
            replace(layer, attention=replace(layer.attention, rope=rope)) for layer in plain.spec.layers
        )
        source = LazySource(replace(plain.spec, layers=layers), plain.metadata)
        for name in plain.names():
            source.add_array(name, plain.load(name) * np.float32(20 if name.endswith("k.bias") else 1))
        windows = np.random.default_rng(1).integers(0, 256, (6, 64))
        target = EncodedTarget((width,) * 3, rope_dim)
        return convert_encoded(source, target, windows, tmp_path_factory.mktemp("spill"), lambda _: None)

    return make


LLAMA3 = RopeSpec(500000.0, 32, "half", tuple(float(1 + 7 * (j > 8)) for j in range(16)))
ENCODED_ROPES = {"qwen": RopeSpec(1e6, 32, "half"), "scaled": LLAMA3}


@pytest.mark.parametrize("name", ENCODED_ROPES)
def test_biases_and_scaled_rope_of_an_encoded_latent(
    make_encoded: Callable[..., TensorSource], name: str, tmp_path: Path
) -> None:
    """Unmodified transformers computes them exactly: attention_bias, a bottleneck for queries, LongRoPE's factors."""
    source = make_encoded(ENCODED_ROPES[name])
    folder = export(source, tmp_path / "out")
    error, kl = difference(source, folder)
    assert error < 2e-3
    assert kl < 1e-7
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] is True
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (64, 32)
    assert (config["rope_theta"], config["rope_scaling"]) == (1e6, None) or name == "scaled"


def test_an_encoded_latent_token_by_token(make_encoded: Callable[..., TensorSource], tmp_path: Path) -> None:
    """transformers caches the latent and the rope key, and nothing more."""
    source = make_encoded(ENCODED_ROPES["scaled"])
    model = load(export(source, tmp_path / "out"))
    cache, logits = None, []
    with torch.no_grad():
        for token in TOKENS[:12]:
            found = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache, logits = found.past_key_values, [*logits, found.logits[0, 0].numpy()]
    assert cache.layers[0].keys.shape[-1] + cache.layers[0].values.shape[-1] == 96
    np.testing.assert_allclose(np.array(logits), reference_logits(source)[:12], atol=2e-3)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"qk_norm": True}, r"has QK-norm.*cannot hold; `edgekv export onnx` writes a graph that can"),
        (
            {"width": 80, "rope_dim": None, "differ": True},
            "layers that differ.*convert with --kv-lora-rank instead",
        ),
        ({"window": 16}, "has a sliding window.*`edgekv export onnx`"),
    ],
)
def test_encoded_latents_that_it_cannot_hold(
    make_encoded: Callable[..., TensorSource], made: dict[str, Any], words: str, tmp_path: Path
) -> None:
    differ = made.pop("differ", False)
    source = make_encoded(ENCODED_ROPES["qwen"], **made)
    if differ:
        first = source.spec.layers[0]
        rope = replace(first.attention.rope, factors=first.attention.rope.factors[::-1])
        other = replace(first, attention=replace(first.attention, rope=rope))
        source = LazySource(replace(source.spec, layers=(other, *source.spec.layers[1:])), source.metadata)
    with pytest.raises(UnsupportedError, match=words):
        export(source, tmp_path / "out")


def test_an_encoded_latent_does_not_fit_float16(
    make_encoded: Callable[..., TensorSource], tmp_path: Path
) -> None:
    source = make_encoded(ENCODED_ROPES["qwen"])
    with pytest.raises(UnsupportedError, match="take --weights bf16 or f32"):
        export(source, tmp_path / "out", "f16")
    assert difference(source, export(source, tmp_path / "out", "bf16"))[1] < 2e-2


def test_another_epsilon_and_low_rank_queries(tmp_path: Path) -> None:
    source = low_rank_queries()
    folder = export(source, tmp_path / "out")
    error, kl = difference(source, folder)
    assert error < 1e-3
    assert kl < 1e-6
    config = json.loads((folder / "config.json").read_text())
    assert config["q_lora_rank"] == 24
    # An epsilon of 1e-3 matters here: the model with another one is another model.
    assert config["rms_norm_eps"] == 1e-6 != source.spec.norm_eps


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 5e-3), ("f16", 1e-4)])
def test_half_precision(
    converted: Callable[[bool], TensorSource], dtype: str, most: float, tmp_path: Path
) -> None:
    source = converted(True)
    folder = export(source, tmp_path / "out", dtype)
    assert load(folder).dtype == getattr(torch, TORCH_NAMES[dtype])
    assert difference(source, folder)[1] < most


def test_float16_values_stay_in_range(converted: Callable[[bool], TensorSource], tmp_path: Path) -> None:
    """A value of 300,000 whose reader is as small is sound in float32 and overflows float16."""
    plain = converted(True)
    source = LazySource(plain.spec, plain.metadata)
    gain = np.float32(2.0**16)
    for name in plain.names():
        array = plain.load(name).copy()
        if name == "blk.1.attn_v_b.weight":
            array[0, 3] *= gain
        if name == "blk.1.attn_output.weight":
            array[:, 3] /= gain
        source.add_array(name, array)
    assert difference(source, export(source, tmp_path / "out", "f16"))[1] < 1e-4


def test_generates_the_same_greedy_text(converted: Callable[[bool], TensorSource], tmp_path: Path) -> None:
    source = converted(True)
    prompt = TOKENS[:12]
    hf = load(export(source, tmp_path / "out"))
    given = torch.tensor([prompt])
    answer = hf.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False)
    model = ReferenceModel(source)
    cache = model.new_cache(64)
    hidden, ours = model.hidden(prompt, cache), list(prompt)
    stops = Tokenizer.from_metadata(source.metadata).stop_ids
    while len(ours) < len(prompt) + 16 and (len(ours) == len(prompt) or ours[-1] not in stops):
        ours.append(int(model.logits(hidden[-1]).argmax()))
        hidden = model.hidden(ours[-1:], cache)
    assert answer[0].tolist() == ours
    assert set(hf.generation_config.eos_token_id) == set(stops)


def test_tokenizer_and_template(smollm2: Path, make_mla: Callable[..., TensorSource], tmp_path: Path) -> None:
    """SmolLM2's own vocabulary, without its weights."""
    from transformers import AutoTokenizer

    metadata = open_model(smollm2).metadata
    source = LazySource(low_rank_queries().spec, metadata)
    for name in low_rank_queries().names():
        source.borrow(low_rank_queries(), name)
    theirs = AutoTokenizer.from_pretrained(export(source, tmp_path / "out"))
    ours = Tokenizer.from_metadata(metadata)
    texts = [
        "Hello, world!  I'm 1234567 years\n\told.",
        "naïve 日本語 🙂\r\n",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    for text in texts:
        ids = ours.encode(text, parse_special=True)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids, special=True)
    messages = [{"role": "user", "content": "What is a cache?"}]
    assert ours.chat_template is not None
    rendered = ChatTemplate(ours.chat_template, "<|im_start|>", "<|im_end|>").render(messages)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == rendered
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token == "<|im_end|>"


def sentence_piece() -> Metadata:
    """A SentencePiece vocabulary: byte tokens, letters, and words with scores."""
    words = ["▁", "▁t", "he", "▁the", "in", "er", "▁th", "▁w", "at", "▁wat", "▁water", "ter", "re"]
    letters = list("abcdefghijklmnopqrstuvwxyz,.")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters)),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }


def test_sentence_piece_tokenizer() -> None:
    import tokenizers

    metadata = sentence_piece()
    ours = Tokenizer.from_metadata(metadata)
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json(ours, metadata))
    rng = random.Random(0)
    bits = ["the", "water", "there", " ", "  ", "in", "\n", "é", "日", "</s>", "wat", "er,", "."]
    for _ in range(300):
        text = "".join(rng.choices(bits, k=rng.randint(1, 8)))
        ids = ours.encode(text, add_special=True, parse_special=True)
        assert theirs.encode(text).ids == ids, text
        plain = ours.encode(text)
        assert theirs.decode(plain) == ours.decode(plain), text


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in
              (("a", (3, 5)), ("b.weight", (7,)), ("c", (2, 3, 4)))}  # fmt: skip
    tensors = [LazyTensor(name, array.shape, lambda a=array: a) for name, array in arrays.items()]  # type: ignore[misc]
    for dtype in ("f32", "f16"):
        write_safetensors(tmp_path / dtype, tensors, dtype, lambda done, total: None)  # type: ignore[arg-type]
        found = load_file(tmp_path / dtype)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(found[name], array.astype(TORCH_NAMES[dtype]))


def test_refusals(tiny_llama: Path, native_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GQA attention"):
        export(open_model(tiny_llama), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="cannot hold; keep it as GGUF"):
        export(open_model(native_mla), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_and_a_full_range_are_safe(
    converted: Callable[[bool], TensorSource], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds something else"):
        write_deepseek(converted(True), tmp_path / "mine", "f32", True, lambda done, total: None)
    large = converted(True)
    source = LazySource(large.spec, large.metadata)
    for name in large.names():
        source.borrow(large, name)
    source.add_array("blk.1.ffn_up.weight", large.load("blk.1.ffn_up.weight") * np.float32(1e6))
    with pytest.raises(InputError, match="does not fit f16"):
        export(source, tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
