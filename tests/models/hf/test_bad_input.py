"""What can be wrong with a folder: one clear error each, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgekv.errors import InputError, ModelFileError, UnsupportedError
from edgekv.models.hf.checkpoint import SINGLE
from edgekv.models.hf.config import read_spec
from edgekv.models.hf.source import HFSource

from .conftest import Zoo

Edit = Callable[..., None]


@pytest.fixture
def folder(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a sound folder, to be broken."""
    return Path(shutil.copytree(zoo.folder("llama2"), tmp_path / "model"))


def refused(folder: Path, kind: type[InputError], phrase: str) -> str:
    with pytest.raises(kind, match=phrase) as caught:
        HFSource(folder)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message  # what to do next
    return message


def split(folder: Path) -> dict[str, str]:
    """The weights in two shards with an index; returns its map."""
    tensors = load_file(folder / "model.safetensors")
    files = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    places = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for name, tensor in tensors.items():
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, path)


def test_shards_give_the_same_tensors(folder: Path, zoo: Zoo) -> None:
    split(folder)
    source, whole = HFSource(folder), HFSource(zoo.folder("llama2"))
    assert source.names() == whole.names()
    assert all(np.array_equal(source.load(name), whole.load(name)) for name in whole.names())


def test_shard_missing(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, ModelFileError, r"shard model-00002-of-00002.safetensors is missing")


def test_index_names_a_tensor_that_is_not_there(folder: Path) -> None:
    places = split(folder) | {"model.norm.weight": "model-00001-of-00002.safetensors"}
    other = next(name for name, file in places.items() if file.startswith("model-00002"))
    places[other] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, ModelFileError, "and it does not")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3])
def test_index_that_leaves_the_folder(folder: Path, file: object) -> None:
    places = dict.fromkeys(split(folder), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, ModelFileError, "no file of this folder")


def test_index_without_a_map(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, ModelFileError, "no weight_map")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_other_dtypes(folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    save_torch(tensors, folder / "model.safetensors")
    message = refused(folder, UnsupportedError, r"up_proj.weight is stored as (F8_E4M3|I8)")
    assert "bfloat16" in message


def test_quantized_checkpoint(folder: Path, edit_config: Edit) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused(folder, UnsupportedError, r"quantized checkpoint \(gptq\)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_touched(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, UnsupportedError, "pickle.*can run any code")


def test_no_weights_and_no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    refused(folder, ModelFileError, "neither model.safetensors nor")
    (folder / "model-00001-of-00001.safetensors").unlink()
    refused(folder, ModelFileError, "holds no weights")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, ModelFileError, "there is no config.json")
    (folder / "config.json").write_text("[]")
    refused(folder, ModelFileError, "not a JSON object")
    for text in ("{,", "[" * 100_000):
        (folder / "config.json").write_text(text)
        refused(folder, ModelFileError, "cannot be read as JSON")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_byte_order_mark(folder: Path, name: str, encoding: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text, encoding)
    with pytest.raises(ModelFileError, match=rf"{name}: begins with a byte order mark.*; save it as UTF-8"):
        dict(HFSource(folder).metadata)


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ],
)
def test_config_without_a_field(folder: Path, field: str, edit_config: Edit) -> None:
    edit_config(folder, **{field: None})
    refused(folder, ModelFileError, f"field {field} is missing")


@pytest.mark.parametrize(
    ("fields", "kind", "phrase"),
    [
        ({"hidden_size": "64"}, ModelFileError, "hidden_size is '64', a whole number"),
        ({"num_hidden_layers": 0}, ModelFileError, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 4}, ModelFileError, "blk.3.attn_norm.weight is missing"),
        ({"num_hidden_layers": 2}, UnsupportedError, "layers.2.* has no place"),
        ({"num_hidden_layers": 5000}, UnsupportedError, "5000 layers"),
        ({"rms_norm_eps": -1}, ModelFileError, "rms_norm_eps is -1, a positive number"),
        ({"num_key_value_heads": 3}, ModelFileError, "a divisor of 4 heads"),
        ({"intermediate_size": 100}, ModelFileError, r"shape \(96, 64\), config.json implies \(100, 64\)"),
        ({"vocab_size": 300}, ModelFileError, "config and weights are not of one model"),
        ({"tie_word_embeddings": "no"}, ModelFileError, "true or false"),
        ({"hidden_act": "relu"}, UnsupportedError, "hidden_act is 'relu'"),
        ({"mlp_bias": True}, UnsupportedError, "feed-forward with biases"),
        ({"attention_bias": True}, ModelFileError, "attn_q.bias is missing"),
        ({"model_type": "mamba"}, UnsupportedError, "'mamba' is not supported; EdgeKV reads llama"),
        (
            {"model_type": "glm_moe_dsa"},
            UnsupportedError,
            "an indexer picks .*; llama.cpp's convert_hf_to_gguf",
        ),
        ({"model_type": "kimi_linear"}, UnsupportedError, "linear attention, which keeps a state"),
        ({"model_type": "longcat_flash"}, UnsupportedError, "two attentions .*; llama.cpp has no graph"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, UnsupportedError, "RoPE scaling 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedError, "a part of each head"),
        ({"partial_rotary_factor": 0.75}, UnsupportedError, "a part of each head"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ModelFileError, "rope_parameters.factor is missing"),
        ({"rope_parameters": 3}, ModelFileError, "rope_parameters is 3, an object"),
        (
            {"rope_parameters": {"full_attention": {}}},
            UnsupportedError,
            "rotary embedding for each layer type",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, UnsupportedError, "transformers does not look at"),
        ({"layer_types": ["full_attention"]}, ModelFileError, "for each of 3 layers"),
        ({"layer_types": ["linear_attention"] * 3}, ModelFileError, "for each of 3 layers"),
        ({"quantization_config": {}}, UnsupportedError, r"quantized checkpoint \(unknown\)"),
        ({"quantization_config": "fp8"}, ModelFileError, "quantization_config is 'fp8', an object"),
    ],
)
def test_config_that_contradicts(
    folder: Path, fields: dict[str, object], kind: type[InputError], phrase: str, edit_config: Edit
) -> None:
    edit_config(folder, **fields)
    refused(folder, kind, phrase)


def test_layers_that_predict_tokens_further_on_are_left_behind(zoo: Zoo, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo.folder("glm-lite"), tmp_path / "model"))
    change(folder, **{"model.layers.3.eh_proj.weight": np.ones((64, 128), np.float32)})
    assert HFSource(folder).names() == HFSource(zoo.folder("glm-lite")).names()


def test_the_language_model_of_a_model_of_pictures(zoo: Zoo, tmp_path: Path, edit_config: Edit) -> None:
    """Names as in memory, and a text_config that leaves out what transformers fills in."""
    name = "gemma3-pictures"
    folder = Path(shutil.copytree(zoo.folder(name), tmp_path / "model"))
    path = folder / SINGLE
    stored = load_file(path)
    save_file(
        {f"model.{n}".replace(".language_model.model.", ".language_model."): t for n, t in stored.items()},
        path,
    )
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_config(folder, text_config={key: value for key, value in text.items() if key != "model_type"})
    source, wanted = HFSource(folder), HFSource(zoo.folder(name))
    assert source.spec.layers == wanted.spec.layers
    assert all(np.array_equal(source.load(tensor), wanted.load(tensor)) for tensor in wanted.names())
    del text["num_attention_heads"], text["vocab_size"]
    edit_config(folder, text_config=text)
    assert read_spec(folder).layers[0].attention.n_heads == 8
    assert read_spec(folder).vocab == 262_208
    edit_config(folder, text_config=None)
    refused(folder, ModelFileError, "text_config is missing, an object")
    edit_config(folder, text_config=text | {"model_type": "mllama_text_model"})
    refused(folder, UnsupportedError, "'mllama_text_model' is not supported")


@pytest.mark.parametrize("kinds", [["dense", "sparse"], ["dense", "sparse", "other"], "sparse"])
def test_layers_of_an_unknown_kind(kinds: object, zoo: Zoo, tmp_path: Path, edit_config: Edit) -> None:
    folder = Path(shutil.copytree(zoo.folder("glm-lite"), tmp_path / "model"))
    edit_config(folder, mlp_layer_types=kinds)
    refused(folder, ModelFileError, "mlp_layer_types is")


def test_tensor_missing_and_one_too_many(folder: Path) -> None:
    change(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(folder, ModelFileError, r"blk.1.ffn_up.weight is missing")
    change(folder, **{"model.layers.1.mlp.up_proj.weight": np.ones((96, 64), np.float32)})
    change(folder, **{"model.layers.1.self_attn.sinks": np.ones(4, np.float32)})
    refused(folder, UnsupportedError, r"self_attn.sinks has no place")


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for broken in (b"", data[:4], data[:100], data[:-10], b"\xff" * 8 + data[8:]):
        path.write_bytes(broken)
        refused(folder, ModelFileError, "not a sound safetensors file")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_numbers(folder: Path, bad: float, dtype: type) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = np.ones((96, 64), dtype)
    tensor[3, 5] = bad
    change(folder, **{name: tensor})
    source = HFSource(folder)
    for read in (source.load, source.raw):
        with pytest.raises(ModelFileError, match=f"{name} holds NaN or infinite"):
            read("blk.0.ffn_up.weight")


def test_tokenizer_of_another_model(folder: Path, edit_config: Edit) -> None:
    change(
        folder,
        **{n: np.ones((100, 64), np.float32) for n in ("model.embed_tokens.weight", "lm_head.weight")},
    )
    edit_config(folder, vocab_size=100)
    source = HFSource(folder)
    with pytest.raises(ModelFileError, match=r"284 tokens and the model 100; tokenizer and weights"):
        dict(source.metadata)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, dtype: str, bad: float) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_torch(folder / SINGLE).items()}
    tensors[name].view(-1)[:2] = torch.tensor([-1.0, 1.0]) * torch.finfo(tensors[name].dtype).max
    save_torch(tensors, folder / SINGLE)
    assert HFSource(folder).raw("blk.1.ffn_up.weight") is not None
    tensors[name][-1, -1] = bad
    save_torch(tensors, folder / SINGLE)
    for read in (HFSource(folder).raw, HFSource(folder).load):
        with pytest.raises(ModelFileError, match="NaN or infinite"):
            read("blk.1.ffn_up.weight")


def test_an_adapter_is_not_left_out_without_a_word(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, UnsupportedError, r"holds an adapter .*; merge it .*, or remove adapter_config.json if")
    (tmp_path / "alone").mkdir()
    (folder / "adapter_config.json").rename(tmp_path / "alone/adapter_config.json")
    refused(tmp_path / "alone", UnsupportedError, "holds an adapter")
    HFSource(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 2**30, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},  # gigabytes of factors
        {"rope_theta": 5e-324, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16,
                          "original_max_position_embeddings": 1, "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 10**400}},
    ],
)  # fmt: skip
def test_rotary_embeddings_that_cannot_be_computed(
    folder: Path, fields: dict[str, object], edit_config: Edit
) -> None:
    edit_config(folder, rope_parameters=None, **({"head_dim": 32} | fields))
    with pytest.raises(ModelFileError, match="was expected"):
        read_spec(folder)
