"""`edgekv heal` end to end on a tiny model and a CPU."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgekv.cli.heal import command
from edgekv.errors import EdgeKVError, InputError, OutputError
from edgekv.heal.recipe import RETIRED
from edgekv.heal.teacher_student import Pair
from edgekv.heal.weights import (
    as_stored,
    base_sha256,
    load_healed,
    read_healed,
    student_tensors,
    write_healed,
)
from edgekv.models.open import open_model
from edgekv.reference.model import ReferenceModel

ARGS = [
    *("--kv-lora-rank", "32", "--rope-dim", "32", "--nope-dim", "16", "--device", "cpu"),
    *("--batch-tokens", "512", "--seq-len", "64", "--lr", "3e-3", "--eval-windows", "8"),
]
MODELS = Path(__file__).parents[2] / "models"

KILLED_AT_THE_FOURTH_SAVE = """
import os, signal, torch
import edgekv.heal.state as checkpoint, edgekv.heal.training as loop
torch.set_num_threads(1)
loop.CHECKPOINT_S = 0.0
saves, write = [], checkpoint.save_file

def save_file(tensors, path, metadata):
    write(tensors, path, metadata)
    saves.append(path)
    if len(saves) == 4:  # half a state on disk
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_file
from edgekv.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def unhealed(tiny_gguf, text_file, tmp_path_factory) -> Path:
    """The conversion as a file of healed weights, so that the tests convert once."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    heal(tiny_gguf, path, text_file, "--steps", "0", "--store", "bf16")
    return path


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def heal(gguf: Path, out: Path, text: Path, *args: str) -> list[dict]:
    """Run the command in this process; its JSON lines."""
    result = CliRunner().invoke(
        command,
        [str(gguf), "-o", str(out), "--text", str(text), *ARGS, "--json", *args],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def evaluations(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["event"] == "evaluation"]


def test_kl_falls_and_the_file_holds_what_was_measured(tiny_gguf, text_file, tmp_path):
    out = tmp_path / "healed.safetensors"
    lines = heal(tiny_gguf, out, text_file, "--steps", "60")
    scores = evaluations(lines)
    assert scores[0]["step"] == 0
    assert scores[-1]["kl"] < 0.9 * scores[0]["kl"]
    assert not out.with_name(out.name + ".state").exists()

    record, _ = read_healed(out)
    assert record.steps_done == record.recipe.steps == 60
    assert record.base_sha256 == base_sha256(open_model(tiny_gguf))
    assert record.data[0].name == "text.txt"
    assert [point.phase for point in record.curve] == [1] * 3 + [2] * 57
    assert record.evaluations[-1].kl == scores[-1]["kl"]

    # the stored tensors, as a GGUF-shaped source in the NumPy reference, lose what the record says
    source = open_model(tiny_gguf)
    teacher, student = ReferenceModel(source), ReferenceModel(load_healed(out, source))
    tokens = np.load(next((tmp_path / "cache/edgekv/tokens").iterdir()))
    windows = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)[-8:].astype(np.int64)
    kl = []
    for window in windows:
        p, q = (
            torch.from_numpy(model.logits(model.hidden(window, model.new_cache(64)))[32:-1]).log_softmax(-1)
            for model in (teacher, student)
        )
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert np.mean(kl) == pytest.approx(scores[-1]["kl"], rel=0.02)


def test_steps_0_writes_the_conversion_and_start_takes_it_up(tiny_gguf, text_file, unhealed, tmp_path):
    out = tmp_path / "out.safetensors"
    lines = heal(tiny_gguf, out, text_file, "--steps", "4", "--start", str(unhealed))
    assert not [line for line in lines if line["event"] == "layerloss"]
    before = read_healed(unhealed)[0].evaluations[-1]
    assert evaluations(lines)[0]["kl"] == pytest.approx(before.kl, rel=1e-3)
    other = ["--steps", "4", "--start", str(unhealed), "--nope-dim", "8", "--force"]
    with pytest.raises(InputError, match="nope_dim"):
        heal(tiny_gguf, out, text_file, *other)


def test_a_second_training_keeps_the_record_of_the_first(tiny_gguf, text_file, unhealed, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    heal(tiny_gguf, first, text_file, "--steps", "2", "--start", str(unhealed))
    heal(tiny_gguf, second, text_file, "--steps", "3", "--start", str(first), "--seq-len", "128")
    record = read_healed(second)[0]
    assert record.earlier == read_healed(first)[0]
    assert (record.recipe.seq_len, record.earlier.recipe.seq_len) == (128, 64)
    assert record.earlier.earlier is None  # an unhealed start was no training
    assert record.tokens_seen == 5 * 512


@pytest.mark.parametrize("options", [["--short-len", "32"], ["--cache-type", "q4_0"]])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny_gguf, text_file, unhealed, tmp_path, options
):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    args = ["--steps", "40", "--start", str(unhealed), *options]
    heal(tiny_gguf, whole, text_file, *args)
    command_line = [*("heal", str(tiny_gguf), "-o", str(killed), "--text", str(text_file)), *ARGS, *args]
    run = subprocess.run([sys.executable, "-c", KILLED_AT_THE_FOURTH_SAVE, *command_line], check=False)
    assert run.returncode == -signal.SIGKILL
    assert killed.with_name(killed.name + ".state").exists()
    assert not killed.exists()
    lines = heal(tiny_gguf, killed, text_file, *args, "--resume")
    assert evaluations(lines)[0]["step"] == 4  # of 40 steps each tenth is scored; three were saved
    a, b = load_file(whole), load_file(killed)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert read_healed(whole)[0].curve == read_healed(killed)[0].curve


def test_a_stopped_training_goes_on_from_its_weights_alone(tiny_gguf, text_file, unhealed, tmp_path):
    out = tmp_path / "out.safetensors"
    args = ["--steps", "100000", "--minutes", "0.02", "--start", str(unhealed)]
    lines = heal(tiny_gguf, out, text_file, *args)
    record, tensors = read_healed(out)
    assert 0 < record.steps_done < 100000
    state = out.with_name(out.name + ".state")
    state.unlink()
    before = evaluations(lines)[-1]
    lines = heal(tiny_gguf, out, text_file, *args, "--resume")
    again, _ = read_healed(out)
    assert again.steps_done > record.steps_done
    assert again.curve[: len(record.curve)] == record.curve
    assert tensors["q"].shape == (3, 4 * 48, 64)
    assert evaluations(lines)[-1]["kl"] < 1.5 * before["kl"] + 0.1


def test_every_other_step_is_on_short_pieces(tiny_gguf, text_file, unhealed, tmp_path, monkeypatch):
    seen: list[tuple[int, ...]] = []
    loss = Pair.kl_loss
    monkeypatch.setattr(
        Pair, "kl_loss", lambda pair, tokens: seen.append(tuple(tokens.shape)) or loss(pair, tokens)
    )
    options = ["--steps", "4", "--match-share", "0", "--start", str(unhealed), "--short-len", "16"]
    heal(tiny_gguf, tmp_path / "out.safetensors", text_file, *options)
    assert seen == [(8, 64), (32, 16)] * 2
    with pytest.raises(InputError, match="does not divide --seq-len 64"):
        heal(tiny_gguf, tmp_path / "other.safetensors", text_file, *options[:-1], "24")


def test_minutes_alone_choose_the_steps(tiny_gguf, text_file, unhealed, tmp_path):
    out = tmp_path / "out.safetensors"
    begin = time.monotonic()
    heal(tiny_gguf, out, text_file, "--minutes", "0.05", "--start", str(unhealed))
    record, _ = read_healed(out)
    assert record.steps_done == record.recipe.steps > 1
    assert time.monotonic() - begin < 60


def test_the_teacher_can_write_the_text(tiny_gguf, tmp_path):
    out = tmp_path / "out.safetensors"
    args = [
        str(tiny_gguf),
        "-o",
        str(out),
        *ARGS,
        "--self",
        "6000",
        "--steps",
        "4",
        "--json",
        "--eval-windows",
        "4",
    ]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0
    (data,) = read_healed(out)[0].data
    assert data.name.startswith("self-")
    assert data.tokens == 94 * 64


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "2", "--resume"], "nothing to resume"),
        (["--lr", "1e-3"], "--steps or --minutes"),
        (["--steps", "2", "--target", "0.5"], "either --target"),
        (["--steps", "2", "--rope-dim", "16", "--cache-type", "q8_0"], "multiples of 32"),
        (["--steps", "2", "--kv-lora-rank", "4000"], "not possible"),
        (["--steps", "2", "--batch-tokens", "1000000"], "one step takes"),
    ],
)
def test_bad_input_is_refused(tiny_gguf, text_file, tmp_path, args, message):
    with pytest.raises(InputError, match=message):
        heal(tiny_gguf, tmp_path / "out.safetensors", text_file, *args)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_output_is_not_overwritten_and_another_training_not_resumed(
    tiny_gguf, text_file, unhealed, tmp_path
):
    out, start = tmp_path / "out.safetensors", ("--start", str(unhealed))
    heal(tiny_gguf, out, text_file, "--steps", "2", *start)
    with pytest.raises(OutputError, match="exists"):
        heal(tiny_gguf, out, text_file, "--steps", "2", *start)
    with pytest.raises(InputError, match="the recipe differs from the stopped training's"):
        heal(tiny_gguf, out, text_file, "--steps", "3", "--resume")
    heal(tiny_gguf, out, text_file, "--steps", "2", *start, "--force")


def test_divergence_is_an_error_with_a_remedy(tiny_gguf, text_file, unhealed, tmp_path):
    args = ["--steps", "40", "--lr", "1e30", "--start", str(unhealed)]
    with pytest.raises(EdgeKVError, match="lower --lr"):
        heal(tiny_gguf, tmp_path / "out.safetensors", text_file, *args)


def test_healed_weights_fit_only_their_original(tiny_gguf, unhealed, tmp_path):
    other = tmp_path / "other.gguf"
    data = bytearray(tiny_gguf.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(InputError, match="another file"):
        load_healed(unhealed, open_model(other))


def test_folding_the_norm_out_and_in_is_exact(tiny_gguf, unhealed):
    _, stored = read_healed(unhealed)
    again = student_tensors(load_healed(unhealed, open_model(tiny_gguf)))
    for name, array in again.items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("storage", "bound"), [("bf16", 0.003), ("q8_0", 0.008), ("q6_k", 0.025)])
def test_a_file_gives_back_the_tensors_as_rounded(unhealed, tmp_path, storage, bound):
    record, tensors = read_healed(unhealed)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(array.shape, np.float32) for name, array in tensors.items()}
    columns = np.logspace(-3, 3, tensors["kv_a"].shape[-1], dtype=np.float32)
    tensors["kv_a"] *= columns  # an encoder's columns differ widely, and each has to keep its precision
    out = tmp_path / "out.safetensors"
    write_healed(out, tensors, record, storage, force=False)
    again, read = read_healed(out)
    assert again == record
    rounded = as_stored(tensors, storage)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], rounded[name], err_msg=name)
        scale = columns if name == "kv_a" else 1
        assert np.linalg.norm((read[name] - array) / scale) <= bound * np.linalg.norm(array / scale), name


def with_recipe(path: Path, out: Path, **recipe: object) -> Path:
    """A copy of a file of healed weights whose record's recipe holds more."""
    with safe_open(path, framework="np") as file:
        document = json.loads(file.metadata()["edgekv.heal"])
    document["record"]["recipe"] |= recipe
    save_file(load_file(path), out, {"edgekv.heal": json.dumps(document)})
    return out


def test_choices_that_older_records_hold_are_read_where_they_are_what_is_done(unhealed, tmp_path):
    copy = with_recipe(unhealed, tmp_path / "old.safetensors", **RETIRED)
    assert read_healed(copy)[0] == read_healed(unhealed)[0]
    for name in RETIRED:
        with pytest.raises(InputError, match=f"was healed with {name} 'x'"):
            read_healed(with_recipe(unhealed, tmp_path / "other.safetensors", **{name: "x"}))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "models").glob("*.safetensors")), ids=lambda path: path.stem
)
def test_the_files_that_come_with_edgekv_are_read(path):
    record, tensors = read_healed(path)
    assert record.recipe.steps == record.steps_done
    assert tensors["q"].shape[0] == 30


def test_healed_weights_of_fewer_layers_than_their_original(tiny_gguf, unhealed, tmp_path):
    record, tensors = read_healed(unhealed)
    out = tmp_path / "out.safetensors"
    write_healed(out, {name: array[:1] for name, array in tensors.items()}, record, "bf16", force=False)
    with pytest.raises(
        InputError, match=r"has 1 layers of width 64, the model 3 of 64; fetch the file again"
    ):
        load_healed(out, open_model(tiny_gguf))


@pytest.mark.parametrize("what", ["nested", "tensors", "axes"])
def test_records_that_are_not_as_written_are_input_errors(unhealed, tmp_path, what):
    with safe_open(unhealed, framework="np") as file:
        document = json.loads(file.metadata()["edgekv.heal"])
    if what == "tensors":
        document["tensors"] = []
    elif what == "axes":
        document["tensors"]["q"]["shape"] = [-1, 64]
    text = "[" * 5000 if what == "nested" else json.dumps(document)
    save_file(load_file(unhealed), tmp_path / "out.safetensors", {"edgekv.heal": text})
    with pytest.raises(InputError):
        read_healed(tmp_path / "out.safetensors")


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "nan", "unscored"])
def test_damaged_files_are_input_errors(unhealed, tmp_path, damage):
    out = tmp_path / "out.safetensors"
    data = unhealed.read_bytes()
    if damage == "cut":
        out.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        out.write_bytes(b"")
    elif damage == "unscored":
        record, tensors = read_healed(unhealed)
        write_healed(out, tensors, dataclasses.replace(record, evaluations=()), "bf16", force=False)
    elif damage == "other":
        out.write_bytes(data.replace(b'edgekv.heal"', b'edgekv.hope"'))
    else:
        out.write_bytes(data[:-2] + b"\xc0\x7f")  # the last value: bfloat16 NaN
    with pytest.raises(InputError):
        read_healed(out)
