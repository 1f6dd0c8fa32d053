"""Small randomly initialised models of transformers itself, one of each kind, saved as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from edgekv.models.hf.special_tokens import PROBE

N_VOCAB = 288
TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, 80)
_BASE = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.25 * i for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
# name: (family in transformers, fields besides the common ones). A model named phi3 has to have Phi-3's tokens
# in llama.cpp: these have not.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama3-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 32}),
    "ministral": (
        "Ministral",
        {"sliding_window": 24, "head_dim": 32, "layer_types": [_LOCAL, _GLOBAL, _LOCAL]},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": {k: v for k, v in _YARN.items() if "mscale" not in k}}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 20, "layer_types": [_GLOBAL, _LOCAL, _GLOBAL]},
    ),
    "phi": ("Phi3", {"sliding_window": 24}),
    "phi-longrope": ("Phi3", {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 128}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "num_hidden_layers": 7},
    ),
    "minicpm3": ("MiniCPM3", {**_LATENT, "q_lora_rank": 24, "initializer_range": 0.1}),
    "minicpm3-longrope": (
        "MiniCPM3",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "initializer_range": 0.1,
            "rope_scaling": {**_LONGROPE, "original_max_position_embeddings": 256},
        },
    ),
    "minicpm3-equal": (
        "MiniCPM3",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "initializer_range": 0.1,
            "rope_scaling": {
                **dict.fromkeys(("short_factor", "long_factor"), [3.0] * 8),
                "rope_type": "longrope",
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek2-lite": ("DeepseekV2", {**_LATENT, **_EXPERTS, "topk_method": "greedy", "rope_scaling": _YARN}),
    "deepseek2-grouped": (
        "DeepseekV2",
        {
            **_LATENT,
            **_EXPERTS,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek3": (
        "DeepseekV3",
        {
            **_LATENT,
            **_EXPERTS,
            "q_lora_rank": 24,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    # Kimi K2 says so of itself and is a DeepSeek V3 in transformers too; its experts are in one group.
    "kimi-k2": (
        "DeepseekV3",
        {
            **_LATENT,
            **_EXPERTS,
            "q_lora_rank": 24,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_theta": 50000.0,
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "kimi-k2-ramp": (
        "DeepseekV3",
        {
            **_LATENT,
            **_EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "rope_theta": 50000.0,
            "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1},
        },
    ),
    "glm-lite": (
        "Glm4MoeLite",
        {
            **_LATENT,
            **{key: value for key, value in _EXPERTS.items() if key != "first_k_dense_replace"},
            "q_lora_rank": 24,
            "v_head_dim": 32,
            "rope_theta": 1e6,
            "mlp_layer_types": ["dense", "dense", "sparse"],
        },
    ),
    "youtu": ("Youtu", {**_LATENT, "q_lora_rank": 24}),
}
_EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WITH_PICTURES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: (family, language model, vision_config)
    "gemma3-pictures": ("Gemma3", "gemma3", {**_EYES, "image_size": 28, "patch_size": 14}),
    "kimi-k25": ("Kimi_K25", "kimi-k2", {**_EYES, "patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4}),
    "mistral3-pictures": (
        "Mistral3",
        "mistral",
        {**_EYES, "head_dim": 16, "image_size": 28, "patch_size": 14},
    ),
}
MODEL_TYPES = {
    "kimi-k2": "kimi_k2",
    "kimi-k2-ramp": "kimi_k2",
}  # in config.json, where it is not transformers'


# As the models' own tokenizer.json have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXTS = (
    "The quick brown fox.\n\nIt jumps 12345 times, doesn't it?",
    "größer, ÅNGSTRÖM; 北京 2008年 🚀 “quoted”",
    "    indented = {'a': 1}\n\treturn  x",
    "",
    " ",
)


def byte_level(expression: str | None, size: int = 400, **options: Any) -> HFTokenizer:
    """A byte-level BPE trained on the texts; `expression` splits as Llama 3 or Qwen2 does, None as GPT-2."""
    tokenizer = HFTokenizer(models.BPE(**options))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    split = [pre_tokenizers.Split(Regex(expression), "isolated")] if expression else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROBE, *TEXTS] * 3, trainer)
    tokenizer.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


class Zoo:
    """Folders of small models and what transformers computes with them, each made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logits: dict[str, np.ndarray] = {}

    def folder(self, name: str) -> Path:
        """A folder with float32 weights."""
        self.logits(name)
        return self._root / name

    def logits(self, name: str) -> np.ndarray:
        """transformers' logits for TOKENS, (T, vocab)."""
        if name not in self._logits:
            self._logits[name] = self._make(name)
        return self._logits[name]

    def _make(self, name: str) -> np.ndarray:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(0)
        model = _random_model(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or key.endswith("bias"):  # zeros or ones, which would hide a mistake
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            for key, buffer in model.named_buffers():
                if key.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.randn_like(buffer) * 0.2)
            logits = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
        model.save_pretrained(self._root / name)
        if name in MODEL_TYPES:
            path = self._root / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": MODEL_TYPES[name]}))
        tokenizer = byte_level(QWEN2, size=N_VOCAB - 8)
        tokenizer.save(str(self._root / name / "tokenizer.json"))
        settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
        (self._root / name / "tokenizer_config.json").write_text(json.dumps(settings))
        return logits


def _random_model(name: str) -> Any:
    """A model of transformers, in evaluation."""
    import transformers

    if name in WITH_PICTURES:
        family, text, vision = WITH_PICTURES[name]
        parts = {"text_config": {**_BASE, **MODELS[text][1]}, "vision_config": vision}
        config = getattr(transformers, f"{family}Config")(**parts)
        kind = "ForConditionalGeneration"
    else:
        family, fields = MODELS[name]
        config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        config, kind = getattr(transformers, config_name)(**{**_BASE, **fields}), "ForCausalLM"
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family}{kind}")(config).eval()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes fields of a folder's config.json; None removes one."""

    def edit(folder: Path, **fields: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= fields
        config = {key: value for key, value in config.items() if value is not None or key not in fields}
        (folder / "config.json").write_text(json.dumps(config))

    return edit
