"""`edgekv convert` from the command line: what it makes, what it refuses, what a kill leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.export.gguf.write import write_gguf
from edgekv.models.gguf.header import read_header
from edgekv.models.open import open_model
from edgekv.source import LazySource

EDGEKV = str(Path(sys.executable).parent / "edgekv")
QUICK = ("--kv-lora-rank", "32", "--rope-dim", "32", "--text-tokens", "256")
Result = subprocess.CompletedProcess[str]


def altered(model: Path, out: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Path:
    """A copy of a model whose tensors go through `change`; None leaves a tensor out."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        array = change(tensor.name, np.array(tensor.data))
        if array is not None:
            writer.add_tensor(tensor.name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class TestOutcome:
    def test_it_writes_verifies_and_tells(
        self, edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "small.gguf"
        result = edgekv("convert", tiny_llama, "-o", out, *QUICK, "--weights", "f32", "--verify", "--json")
        assert (result.returncode, result.stderr) == (0, "")
        found = json.loads(result.stdout)
        assert found["verify"]["kl"] < 1e-5
        assert found["cache_bytes_per_token"] == {"before": 3 * 128 * 2, "after": 3 * 64 * 2}
        assert found["bytes"] == out.stat().st_size
        assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
        curve = found["layers"][0]["latent_kept_at"]
        assert list(curve) == ["32", "64"]
        assert curve["32"] == pytest.approx(found["layers"][0]["latent_kept"])
        assert list(curve.values()) == sorted(curve.values())
        assert all(0 < layer["output_error"] < 1 for layer in found["layers"])
        metadata = open_model(out).metadata
        assert metadata["edgekv.method"] == "edgekv"
        assert metadata["edgekv.calibration"] == "sampled from the model"
        assert metadata["edgekv.calibration_tokens"] == found["notes"]["edgekv.calibration_tokens"]
        assert metadata["edgekv.output_error"] == pytest.approx(
            [layer["output_error"] for layer in found["layers"]], abs=1e-5
        )
        assert os.listdir(tmp_path) == ["small.gguf"]

    def test_the_same_seed_gives_the_same_file(
        self, edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path
    ) -> None:
        calib = tmp_path / "calib.txt"
        calib.write_text("abcdefghij klmnop. " * 400)
        files = []
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            out = tmp_path / f"{name}.gguf"
            result = edgekv("convert", tiny_llama, "-o", out, *QUICK, "--seed", seed, "--text", calib)
            assert result.returncode == 0, result.stderr
            assert "wrote" in result.stdout
            files.append(out.read_bytes())
        assert files[0] == files[1] != files[2]
        assert open_model(out).metadata["edgekv.calibration"] == "calib.txt"

    def test_target_picks_the_sizes(
        self, edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "half.gguf"
        result = edgekv(
            "convert",
            tiny_llama,
            "-o",
            out,
            "--target",
            "0.5",
            "--method",
            "transmla",
            "--text-tokens",
            "256",
        )
        assert result.returncode == 0, result.stderr
        assert "(-50.0%)" in result.stdout
        assert open_model(out).spec.cache_values == 3 * 64
        assert open_model(out).metadata["edgekv.method"] == "transmla"

    def test_force_replaces(self, edgekv: Callable[..., Result], tiny_llama: Path, tmp_path: Path) -> None:
        out = tmp_path / "small.gguf"
        out.write_bytes(b"old")
        assert edgekv("convert", tiny_llama, "-o", out, *QUICK, "--force").returncode == 0
        assert open_model(out).spec.arch == "deepseek2"


class TestBadModels:
    """Each is refused in one line with a remedy, exit code 2, and nothing is written."""

    @pytest.fixture
    def refuses(self, refused: Callable[..., str], tmp_path: Path) -> Callable[[Path], str]:
        def run(model: Path) -> str:
            folder = tmp_path / "out"
            folder.mkdir(exist_ok=True)
            message = refused("convert", model, "-o", folder / "out.gguf", *QUICK)
            assert list(folder.iterdir()) == []
            return message

        return run

    def test_not_a_model(self, refuses: Callable[[Path], str], tmp_path: Path) -> None:
        assert "no such file" in refuses(tmp_path / "none.gguf")
        assert "there is no config.json" in refuses(tmp_path)
        text = tmp_path / "readme.md"
        text.write_text("# Not a model, but long enough to be one")
        assert "is not a GGUF file" in refuses(text)

    def test_wrong_version(self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path) -> None:
        path = tmp_path / "v9.gguf"
        content = bytearray(tiny_llama.read_bytes())
        content[4] = 9
        path.write_bytes(content)
        assert "version 9" in refuses(path)

    def test_missing_tensor(self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path) -> None:
        gone = "blk.1.attn_k.weight"
        path = altered(tiny_llama, tmp_path / "m.gguf", lambda name, a: None if name == gone else a)
        assert f"{gone} is missing" in refuses(path)

    def test_impossible_dims(self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path) -> None:
        narrow = "blk.2.ffn_up.weight"
        path = altered(tiny_llama, tmp_path / "m.gguf", lambda name, a: a[:-1] if name == narrow else a)
        assert narrow in (message := refuses(path))
        assert "shape (95, 64)" in message

    def test_offset_past_the_end(
        self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "m.gguf"
        content = tiny_llama.read_bytes()
        last = read_header(tiny_llama).tensors[-1].name.encode()
        at = content.rindex(last) + len(last) + 4 + 8 + 4  # dims, one dim, type
        path.write_bytes(content[:at] + (2**40).to_bytes(8, "little") + content[at + 8 :])
        assert "output_norm.weight starts at byte" in refuses(path)

    def test_unsupported_architecture(
        self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "m.gguf"
        content = tiny_llama.read_bytes()
        path.write_bytes(content.replace(b"llama", b"mamba"))
        assert "'mamba'" in refuses(path)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_weights_that_are_no_numbers(
        self, refuses: Callable[[Path], str], tiny_llama: Path, tmp_path: Path, value: float
    ) -> None:
        def spoil(name: str, array: np.ndarray) -> np.ndarray:
            if name == "blk.1.ffn_gate.weight":
                array[3, 5] = value
            return array

        message = refuses(altered(tiny_llama, tmp_path / "m.gguf", spoil))
        assert "blk.1.ffn_gate.weight holds NaN" in message

    def test_already_converted(self, refuses: Callable[[Path], str], tiny_mla: Path) -> None:
        assert "already has MLA" in refuses(tiny_mla)


def test_a_model_truncated_anywhere_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At twenty places, in this process: starting Python twenty times would test nothing more."""
    from edgekv.cli.main import main

    content = tiny_llama.read_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    path = tmp_path / "cut.gguf"
    monkeypatch.setattr(sys, "argv", ["edgekv", "convert", str(path), "-o", str(folder / "o.gguf"), *QUICK])
    for length in [0, 3, 12, *np.linspace(24, len(content) - 1, 17).astype(int).tolist()]:
        path.write_bytes(content[:length])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert left.value.code == 2, length
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1
        assert "download" in printed.err
        assert list(folder.iterdir()) == []


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ((), "either --target SHARE or --kv-lora-rank"),
            (("--target", "0.5", "--kv-lora-rank", "32"), "either --target SHARE or --kv-lora-rank"),
            (("--kv-lora-rank", "129"), "takes 1 to 128"),
            (("--kv-lora-rank", "0"), "takes 1 to 128"),
            (("--target", "0.1"), "smallest target for this model is 0.500"),
            (("--target", "1.5"), "between 0 and 1"),
            (("--target", "nan"), "between 0 and 1"),
            (("--kv-lora-rank", "32", "--rope-dim", "34"), "even, from 2 to 32"),
            (("--kv-lora-rank", "32", "--rope-dim", "0"), "even, from 2 to 32"),
            (("--kv-lora-rank", "32", "--nope-dim", "33"), "--nope-dim 33"),
            (("--kv-lora-rank", "32", "--value-dim", "0"), "--value-dim 0"),
            (("--kv-lora-rank", "32", "--value-dim", "16", "--method", "transmla"), "--value-dim 16"),
            (("--kv-lora-rank", "32", "--text-tokens", "0"), "--text-tokens"),
            (("--kv-lora-rank", "32", "--text", "none.txt"), "none.txt"),
        ],
    )
    def test_impossible_sizes(
        self, tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], words: str,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        from edgekv.cli.main import main

        arguments = ["convert", str(tiny_llama), "-o", str(tmp_path / "out.gguf"), *options]
        monkeypatch.setattr(sys, "argv", ["edgekv", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert (left.value.code, printed.out) == (2, "")
        assert words in printed.err.splitlines()[-1]
        assert "Traceback" not in printed.err
        assert list(tmp_path.iterdir()) == []

    def test_output_that_cannot_be(
        self, refused: Callable[..., str], tiny_llama: Path, tmp_path: Path
    ) -> None:
        model = shutil.copy(tiny_llama, tmp_path / "model.gguf")
        before = model.read_bytes()
        assert "--force" in refused("convert", model, "-o", model, *QUICK)
        assert "mkdir -p" in refused("convert", model, "-o", tmp_path / "no" / "such" / "out.gguf", *QUICK)
        assert "exists; pass --force" in refused("convert", model, "-o", tmp_path, *QUICK)
        assert "something else" in refused("convert", model, "-o", tmp_path, *QUICK, "--force")
        assert model.read_bytes() == before
        assert os.listdir(tmp_path) == ["model.gguf"]

    @pytest.mark.parametrize(("blocks", "full"), [(8, "writer.gguf"), (256, "out.gguf")])
    def test_a_full_disk(self, tiny_llama: Path, tmp_path: Path, blocks: int, full: str) -> None:
        """A limit on the size of files stands for the disk: for the model that writes text, and for the output."""
        out = tmp_path / "out.gguf"
        command = (
            f"ulimit -f {blocks}; {EDGEKV} convert {tiny_llama} -o {out} {' '.join(QUICK)} --weights f32"
        )
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert full in result.stderr
        assert "free some space" in result.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def slow_model(make_llama: Callable[..., LazySource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a vocabulary large enough that writing it takes a moment."""
    source = make_llama(filler=100_000)
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    write_gguf(source, path, "f32", {}, False, lambda *_: None)
    return path


def test_kill_in_the_middle_of_writing_leaves_no_output(slow_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    calib = tmp_path.parent / "calib.txt"
    calib.write_text("abcdefghij klmnop. " * 400)
    process = subprocess.Popen(
        [EDGEKV, "convert", slow_model, "-o", out, *QUICK, "--weights", "q5_1", "--text", calib],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    started = time.monotonic()
    while not any(path.stat().st_size > 0 for path in tmp_path.iterdir()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - started < 200
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert not out.exists()
    assert [path.suffix for path in left] == [".partial"]
    assert left[0].name.startswith(".out.gguf.")
