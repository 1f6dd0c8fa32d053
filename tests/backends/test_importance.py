"""The importance matrix and sampling, against the NumPy reference."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.backends.isolated.quantizer import Quantizer
from edgekv.backends.llama_cpp.importance import LOGITS_EVERY
from edgekv.models.open import open_model
from edgekv.progress import ignore
from edgekv.reference.model import ReferenceModel
from edgekv.reference.ops import log_softmax, rms_norm
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

WINDOWS = np.random.default_rng(5).integers(0, 256, (3, 64))


def first_inputs(path: Path) -> np.ndarray:
    """What the first block's projections read, (tokens, width)."""
    source = open_model(path)
    x = source.load("token_embd.weight")[WINDOWS.reshape(-1)]
    return rms_norm(x, source.load("blk.0.attn_norm.weight"), source.spec.norm_eps)


def test_inputs_of_the_first_and_the_last_matrix(tiny_llama: Path) -> None:
    found = Quantizer(tiny_llama, 1).measure(WINDOWS, ignore)
    expected = np.square(first_inputs(tiny_llama)).mean(axis=0)
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight"], expected, rtol=1e-4)
    model = ReferenceModel(open_model(tiny_llama))
    hidden = [model.hidden(window.tolist(), model.new_cache(64)) for window in WINDOWS]
    seen = np.concatenate([rows[LOGITS_EVERY - 1 :: LOGITS_EVERY] for rows in hidden])
    # The engine's cache is f16, and three blocks lie between.
    np.testing.assert_allclose(found["token_embd.weight"], np.square(seen).mean(axis=0), rtol=0.02)
    kinds = {name.split(".")[2] for name in found if name.startswith("blk.")}
    assert kinds == {f"attn_{name}" for name in ("q", "k", "v", "output")} | {
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    }


def test_each_head_of_a_latent_has_its_own(tiny_mla: Path) -> None:
    found = Quantizer(tiny_mla, 1).measure(WINDOWS, ignore)
    source = open_model(tiny_mla)
    attention = source.spec.layers[0].attention
    queries = first_inputs(tiny_mla) @ source.load("blk.0.attn_q.weight").T
    nope = queries.reshape(len(queries), attention.n_heads, -1)[..., :16]
    expected = np.square(nope).mean(axis=0)  # (heads, nope dims)
    np.testing.assert_allclose(found["blk.0.attn_k_b.weight"].reshape(4, 16), expected, rtol=1e-3)
    assert found["blk.0.attn_v_b.weight"].size == 4 * 32


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with four experts, all of which every token uses."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    letters = [*BYTE_OF_LETTER, "<|endoftext|>"]
    sizes = {"context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
    sizes |= {"head_count": 2, "expert_count": 4, "expert_used_count": 4, "vocab_size": len(letters)}
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["a b"])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(letters), 64), "output_norm": (64,)}
    for i in range(2):
        block: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_norm", "ffn_norm"), (64,))
        block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (64, 64))
        block |= {"ffn_gate_inp": (4, 64), "ffn_down_exps": (4, 64, 96)}
        block |= dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), (4, 96, 64))
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape) * 0.2 + ("norm" in name)
        writer.add_tensor(f"{name}.weight", noise.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts(tiny_moe: Path) -> None:
    """Experts that see every token see what their router sees."""
    found = Quantizer(tiny_moe, 1).measure(WINDOWS, ignore)
    router = found["blk.1.ffn_gate_inp.weight"]
    for name in ("ffn_gate_exps", "ffn_up_exps"):
        experts = found[f"blk.1.{name}.weight"].reshape(4, 64)
        np.testing.assert_allclose(experts, np.tile(router, (4, 1)), rtol=1e-4)
    down = found["blk.1.ffn_down_exps.weight"].reshape(4, 96)
    assert np.ptp(down, axis=0).min() > 0  # what they make of it differs


def test_samples_follow_the_models_own_distribution(tiny_llama: Path) -> None:
    """Surprise on its own samples averages to its entropy."""
    prompts = np.random.default_rng(2).integers(0, 256, (16, 2))
    quantizer = Quantizer(tiny_llama, 1)
    windows = quantizer.sample(prompts, 48, 7, ignore)
    assert windows.shape == (16, 48)
    np.testing.assert_array_equal(windows[:, :2], prompts)
    np.testing.assert_array_equal(windows, quantizer.sample(prompts, 48, 7, ignore))
    assert (windows != quantizer.sample(prompts, 48, 8, ignore)).any()
    model = ReferenceModel(open_model(tiny_llama))
    surprise, entropy = [], []
    for window in windows.tolist():
        logs = log_softmax(model.logits(model.hidden(window, model.new_cache(48))))[1:-1]
        surprise.append(-logs[np.arange(len(logs)), window[2:]])
        entropy.append(-(np.exp(logs) * logs).sum(axis=-1))
    spread = np.std(np.concatenate(surprise) - np.concatenate(entropy)) / np.sqrt(16 * 46)
    assert abs(np.mean(surprise) - np.mean(entropy)) < 4 * spread
