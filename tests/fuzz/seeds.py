"""Sound files of every kind that EdgeKV reads, small: what the mutations start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgekv.cache.rows import CacheRows, Plane
from edgekv.cache.rows_file import Header, write_rows_file
from edgekv.chat.packs import PackNotes
from edgekv.chat.saved import Notes
from edgekv.export.gguf.write import write_gguf
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.heal.recipe import CurvePoint, DataRecord, Evaluation, HealedRecord, HealRecipe
from edgekv.heal.weights import FORMAT, base_sha256, write_healed
from edgekv.models.gguf.own import OWN_ARCH
from edgekv.models.gguf.source import GGUFSource
from edgekv.models.identity import ModelIdentity
from edgekv.serve.engine.disk import NoNotes
from edgekv.source import LazySource, TensorSource
from edgekv.spec import GQA, MLA, LayerSpec, ModelSpec, RopeSpec
from edgekv.tensors import layer_tensor_shapes
from edgekv.tokenizer.bpe import BYTE_OF_LETTER

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TOKENS = [*BYTE_OF_LETTER, "ab", *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(TOKENS), "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True, "eos_token_id": 258, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64},
}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA | {
        "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"], "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "phi3": LLAMA | {
        "model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    "gemma3": {"model_type": "gemma3", "text_config": LLAMA | {
        "model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 16, "rope_scaling": None,
        "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}},
    "deepseek_v3": LLAMA | {
        "model_type": "deepseek_v3", "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "q_lora_rank": None, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0, "moe_layer_freq": 1, "rope_scaling": {
            "type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 64}},
    "smollm3": LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0], "rope_scaling": None},
}  # fmt: skip


def write_seeds(folder: Path) -> None:
    """One folder of sound files for each target of `targets.py`, by its name."""
    for name, config in CONFIGS.items():
        _write_json(folder / "config" / name / "config.json", config)
    write_hf_folder(folder / "hf")
    (folder / "gguf").mkdir()
    write_gguf(source(), folder / "gguf/model.gguf", "f32", {}, False, lambda *_: None)
    write_onnx(source(), folder / "onnx", OnnxOptions(), False, lambda *_: None)
    _write_sentencepiece(folder / "sentencepiece")
    _write_healed(folder / "healed")
    (folder / "own").mkdir()
    own = source()
    own.spec = replace(own.spec, arch=OWN_ARCH)
    write_gguf(own, folder / "own/model.edgekv", "f32", {}, False, lambda *_: None)
    _write_sessions(folder / "sessions")
    _write_reports(folder / "reports")
    _write_tasks(folder / "tasks")
    (folder / "sweep").mkdir()
    (folder / "sweep/sweep.toml").write_text(
        'model = "m.gguf"\ntext = "t.txt"\nwindow = 512\nweights = "f32"\ncache_types = ["f16", "q4_0"]\n\n'
        '[[conversion]]\nname = "half"\nfile = "half.gguf"\ncache_types = ["q8_0"]\n\n'
        '[[conversion]]\nname = "third"\nconvert = "--target 0.33"\ncache_types = ["f16"]\n'
    )
    (folder / "template").mkdir()
    (folder / "template/template.jinja").write_text(
        "{% set ns = namespace(n=0) %}{% macro line(m, i) %}{{ i }}: {{ m.content | trim }}{% endmacro %}" + TEMPLATE
        + "{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{{ line(m, ns.n) }}{% endfor %}"
        + "{{ {'a': [1, 2.5, none]} | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ bos_token ~ eos_token }}"
    )  # fmt: skip


def source() -> LazySource:
    """A llama of two layers with a byte-level vocabulary."""
    attention = GQA(2, 1, 16, RopeSpec(10000.0, 16))
    spec = ModelSpec("llama", "tiny", (LayerSpec(attention, 32),) * 2, 32, len(TOKENS), 128, 1e-5, True)
    metadata = {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * 257 + [3] * 3,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }
    made = LazySource(spec, metadata)
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(TOKENS), 32), "output_norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{n}": shape for n, shape in layer_tensor_shapes(attention, 32, 32).items()}
    for name, shape in shapes.items():
        made.add_array(name, rng.standard_normal(shape).astype(np.float32))
    return made


def write_hf_folder(folder: Path) -> None:
    """The same kind of model as config.json, safetensors in two shards, and a tokenizer with its companions."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", LLAMA)
    _write_json(folder / "generation_config.json", {"eos_token_id": [258, 259], "temperature": 0.6})
    shapes = {"model.embed_tokens.weight": (len(TOKENS), 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{n}_proj.weight": s for n, s in (
            ("q", (32, 32)), ("k", (16, 32)), ("v", (16, 32)), ("o", (32, 32)))}  # fmt: skip
        shapes |= {layer + f"mlp.{name}_proj.weight": (32, 32) for name in ("gate", "up", "down")}
        shapes |= {layer + f"{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(1)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(shapes)}
    for file in sorted(set(places.values())):
        tensors = {
            n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items() if places[n] == file
        }
        save_file(tensors, folder / file, {"format": "pt"})
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS[:257])}, merges=[("a", "b")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(257 + i): {"content": text, "special": True, "rstrip": False} for i, text in enumerate(SPECIAL)
    }
    _write_json(folder / "tokenizer_config.json", {
        "bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[1]}, "add_bos_token": False,
        "chat_template": [{"name": "default", "template": TEMPLATE}], "added_tokens_decoder": decoder,
    })  # fmt: skip


def _write_sentencepiece(folder: Path) -> None:
    """A folder with only SentencePiece's tokenizer.model, BPE with byte fallback."""
    from sentencepiece import SentencePieceTrainer

    _write_json(folder / "config.json", LLAMA)
    text = ["sea", "wide", "sand", "dry", "cat", "sat", "under", "table", "said", "ann"]
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(text[i:] + text[:i]) for i in range(len(text))]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    _write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    _write_json(folder / "added_tokens.json", {"<|im_end|>": 299})


def _write_healed(folder: Path) -> None:
    """Healed weights and the model that they belong to."""
    folder.mkdir()
    path = folder / "model.gguf"
    write_gguf(source(), path, "f32", {}, False, lambda *_: None)
    mla, rng = MLA(2, 8, 8, 16, RopeSpec(10000.0, 8)), np.random.default_rng(2)
    shapes = {
        "q": (2, 32, 32),
        "kv_a": (2, 16, 32),
        "k_b": (2, 2, 8, 8),
        "v_b": (2, 2, 16, 8),
        "output": (2, 32, 32),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["latent_mean_square"] = np.ones(2, np.float32)
    write_healed(folder / "healed.safetensors", tensors, _record(GGUFSource(path), mla), "q8_0", False)


def _record(model: TensorSource, mla: MLA) -> HealedRecord:
    first = HealedRecord(
        format=FORMAT,
        base_name="tiny",
        base_sha256=base_sha256(model),
        n_heads=mla.n_heads,
        kv_lora_rank=mla.kv_lora_rank,
        rope_dim=mla.rope.dim,
        nope_dim=mla.nope_dim,
        value_dim=mla.value_dim,
        rope_theta=mla.rope.theta,
        recipe=HealRecipe(100),
        steps_done=100,
        data=(DataRecord("text.txt", "0" * 64, 1000),),
        evaluation_text="text.txt",
        evaluations=(Evaluation(100, 20.0, 19.0, 0.05, 0.9, 1000),),
        curve=(CurvePoint(50, 1, 0.5), CurvePoint(100, 2, 0.05)),
        made_with="edgekv",
    )
    return replace(first, earlier=first)


def _write_sessions(folder: Path) -> None:
    """A session, a pack and what a server keeps on disk, of two saves' worth of blocks."""
    folder.mkdir()
    layout = tuple(Plane(f"{i}.{kind}", "q4_0", 32) for i in range(2) for kind in ("key", "value"))
    model = ModelIdentity("tiny", "0" * 64, (8, 8), (RopeSpec(10000.0, 8),) * 2)
    tokens = list(range(300))
    rows = CacheRows.empty(layout, len(tokens))
    notes = Notes("Be brief.", (("hi", "Hello."),), None, (), 512)
    for kind, name, noted in (
        ("session", "a.session", notes),
        ("pack", "a.pack", PackNotes(3, ("text.txt",))),
        ("prefix", "a.prefix", NoNotes()),
    ):
        header = Header.of(f"edgekv.{kind}", model, layout)  # type: ignore[arg-type]
        write_rows_file(folder / name, header, tokens, rows, noted)


def _write_reports(folder: Path) -> None:
    """A report of EdgeKV, and llama-bench's as an array and as lines with a log."""
    folder.mkdir()
    reports = Path(__file__).parents[1] / "devices/reporting/reports"
    (folder / "edgekv.json").write_bytes((reports / "measured.json").read_bytes())
    test = {
        "build_commit": "0badc0de", "build_number": 6264, "cpu_info": "Some board", "gpu_info": "", "backends": "CPU",
        "model_filename": "models/a.gguf", "model_type": "llama 1B Q4_0", "model_size": 700000000, "n_batch": 2048,
        "model_n_params": 1200000000, "n_threads": 4, "type_k": "f16", "type_v": "q8_0", "n_gpu_layers": 0,
        "flash_attn": False, "n_prompt": 0, "n_gen": 128, "n_depth": 0, "test_time": "2026-08-25T10:00:00Z",
        "avg_ts": 10.0, "stddev_ts": 0.1, "samples_ts": [10.0, 11.0],
    }  # fmt: skip
    tests = [test, test | {"n_prompt": 512, "n_gen": 0}, test | {"n_threads": 2, "n_depth": 512}]
    (folder / "llama-bench.json").write_text(json.dumps(tests, indent=1))
    (folder / "llama-bench.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tests))


def _write_tasks(folder: Path) -> None:
    """A file of questions for each of two forms, and one of texts."""
    folder.mkdir()
    choices = [{"query": f"Which is _ wet, {i}?", "choices": ["sea", "sand"], "gold": i} for i in range(2)]
    (folder / "winogrande.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "lambada.jsonl").write_text(json.dumps({"text": "the cat sat under the table"}) + "\n")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
