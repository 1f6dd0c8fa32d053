"""The same rows stay as in kvpress, PyPI's collection of policies, on a small random GQA model."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgekv.cache.policies.base import LayerView, highest
from edgekv.cache.policies.named import policy_named
from edgekv.cache.policies.norms import output_norms
from edgekv.cache.policies.observe import Observer
from edgekv.reference.probe import probe_ahead, without_rope
from edgekv.spec import GQA, RopeSpec

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

N_TOKENS, N_HEADS, N_GROUPS, WIDTH, DIM = 150, 4, 2, 16, 48
FOUND = importlib.util.find_spec("kvpress")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs kvpress: pip install --no-deps kvpress==0.5.5")


@pytest.fixture(scope="module")
def presses() -> Iterator[Callable[[str, str], Any]]:
    """Classes of kvpress.presses, without what the package's own __init__ imports for its pipeline."""
    assert FOUND is not None
    package = types.ModuleType("kvpress")
    package.__path__ = list(FOUND.submodule_search_locations or ())  # type: ignore[attr-defined]
    before = sys.modules.get("kvpress")
    sys.modules["kvpress"] = package
    yield lambda module, name: getattr(importlib.import_module(f"kvpress.presses.{module}"), name)
    if before is None:
        del sys.modules["kvpress"]
    else:
        sys.modules["kvpress"] = before


@pytest.fixture(scope="module")
def layer() -> types.SimpleNamespace:
    """An attention layer of transformers behind a forward pass: what presses see, and the same as LayerView."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaAttention,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = LlamaConfig(
        hidden_size=DIM, num_attention_heads=N_HEADS, num_key_value_heads=N_GROUPS, head_dim=WIDTH,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaAttention(config, 0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    module.rotary_emb = LlamaRotaryEmbedding(config)
    hidden = torch.randn(1, N_TOKENS, DIM)
    cos_sin = module.rotary_emb(hidden, torch.arange(N_TOKENS)[None])
    with torch.no_grad():
        plain_q = module.q_proj(hidden).view(N_TOKENS, -1, WIDTH).numpy() / np.float32(WIDTH**0.5)
        q, k, v = (
            part(hidden).view(1, N_TOKENS, -1, WIDTH).transpose(1, 2)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        mask = torch.full((N_TOKENS, N_TOKENS), float("-inf")).triu(1)
        scores = q @ k.repeat_interleave(N_HEADS // N_GROUPS, 1).transpose(2, 3) / WIDTH**0.5 + mask
    queries, keys = q[0].transpose(0, 1).numpy() / np.float32(WIDTH**0.5), k[0].numpy()
    observer = Observer({"queries", "attention", "probe"}, 1)
    for start in range(0, N_TOKENS, 40):  # as a prompt that comes in pieces
        stop = min(start + 40, N_TOKENS)
        observer.see(0, queries[start:stop], keys[:, :stop])
        observer.add(0, plain_q[start:stop], start)
    rope = GQA(N_HEADS, N_GROUPS, WIDTH, RopeSpec(10000.0, WIDTH, "half"))
    np.testing.assert_allclose(without_rope(queries, 0, rope), plain_q, atol=1e-5)
    probe = probe_ahead(*observer.statistics(0), N_TOKENS, rope)
    maps = module.o_proj.weight.detach().numpy().reshape(DIM, N_HEADS, WIDTH).transpose(1, 2, 0)
    return types.SimpleNamespace(
        seen=(module, hidden, k, v, scores.softmax(-1), {"position_embeddings": cos_sin}),
        view=LayerView(
            N_GROUPS,
            N_TOKENS,
            keys,
            output_norms(v[0].numpy(), maps),
            observer.queries(0),
            observer.attention(0),
            probe,
        ),
    )


CASES = {
    "streaming": ("streaming_llm_press", "StreamingLLMPress"),
    "knorm": ("knorm_press", "KnormPress"),
    "keydiff": ("keydiff_press", "KeyDiffPress"),
    "snapkv": ("snapkv_press", "SnapKVPress"),
    "tova": ("tova_press", "TOVAPress"),
    "expected": ("expected_attention_press", "ExpectedAttentionPress"),
    "h2o": ("observed_attention_press", "ObservedAttentionPress"),
}


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("critical", [False, True], ids=["plain", "critical"])
@pytest.mark.parametrize("name", CASES)
def test_same_rows(
    presses: Callable[[str, str], Any],
    layer: types.SimpleNamespace,
    name: str,
    critical: bool,
    ratio: float,
) -> None:
    press = presses(*CASES[name])(compression_ratio=ratio)
    press.use_vnorm = False  # of expected attention: its norms are those of the values alone
    n_kept = int(N_TOKENS * (1 - ratio))
    with torch.no_grad():
        if critical:
            plain = press.score
            press.score = lambda *seen: lifted(name, plain(*seen))
            press = presses("criticalkv_press", "CriticalKVPress")(press)
        theirs = press.score(*layer.seen)[0].numpy()
    ours = policy_named(f"critical-{name}" if critical else name).scores(layer.view, n_kept)
    assert ours.shape == theirs.shape
    expected = np.sort(np.argsort(theirs, axis=-1, kind="stable")[:, -n_kept:], axis=-1)
    np.testing.assert_array_equal(highest(ours, n_kept), expected)


def lifted(name: str, scores: Any) -> Any:
    """Scores that are not negative: multiplied by norms, as kvpress has them, negative ones would turn their order."""
    if name == "keydiff":
        return 1 + scores
    return scores - scores.amin(-1, keepdim=True) if name == "knorm" else scores
