"""The attention kernel against NumPy's float64, in the model, under sanitizers, and where it cannot be had."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.kernel_names import KERNEL_VARIABLE
from edgekv.backends.llama_cpp.kernel import build as kernel_build
from edgekv.backends.llama_cpp.kernel.build import FLAGS, HERE, build, build_path, built_path
from edgekv.backends.llama_cpp.kernel.check import KINDS, error, tolerance
from edgekv.backends.llama_cpp.kernel.load import chosen_kernel
from edgekv.backends.llama_cpp.kernel.node import (
    BFLOAT16,
    EIGHT_BITS,
    Node,
    attend,
    load_backend,
    rounded,
    rounding,
    softmax_twin,
    stored_as,
    twin,
)
from edgekv.backends.open import open_backend
from edgekv.errors import BackendError, InputError
from edgekv.reference.ops import kl_rows, log_softmax

PROGRAM = Path(__file__).with_name("kernel_problem.cpp")
ARM_COMPILER = "aarch64-linux-gnu-g++"
pytestmark = pytest.mark.usefixtures("kernel_unloaded")
ARCHER = sorted(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"))


@pytest.fixture(scope="module")
def backend(built: Path) -> Any:
    return load_backend(built, n_threads=2)


def random_node(kind: GGMLType, rng: np.random.Generator) -> Node:
    """A latent's or a GQA node with any number of sequences, heads, tokens and rows, masked in every way."""

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def pick(*values: int) -> int:
        return int(rng.choice(values))

    n, groups, tokens, rows = (
        pick(1, 1, 2),
        pick(1, 1, 2, 3),
        pick(1, 1, 2, 7, 13, 64, 90),
        pick(1, 5, 64, 255, 640, 1100),
    )
    heads, width_k = groups * pick(1, 2, 3, 5, 9, 16), 32 * pick(1, 2, 3, 6, 8, 10)
    latent = groups == 1 and rng.random() < 0.5
    width_v = 32 * pick(*range(1, width_k // 32 + 1)) if latent else 32 * pick(1, 2, 3, 8)
    other = GGMLType[KINDS[pick(*range(len(KINDS)))]] if rng.random() < 0.3 and not latent else kind
    mask = None
    if rng.random() < 0.8:
        past = int(rng.integers(0, rows))
        ahead = np.arange(rows) > past + np.arange(tokens)[:, None]
        behind = np.arange(rows) < np.minimum(past + np.arange(tokens)[:, None], rows - 1) - 100
        hidden = ahead | behind if rng.random() < 0.3 else ahead
        shape = (pick(1, n), pick(1, 1, heads), tokens, rows)
        mask = np.where(
            hidden, -np.inf, rng.standard_normal(shape) if rng.random() < 0.3 else np.zeros(shape)
        )
        mask = mask.astype(np.float16)
    return Node(
        q=noise(n, heads, tokens, width_k),
        k=noise(n, groups, rows, width_k),
        v=None if latent else noise(n, groups, rows, width_v),
        type_k=kind,
        type_v=other,
        width_v=width_v,
        mask=mask,
        sinks=noise(heads) if rng.random() < 0.2 else None,
        scale=width_k**-0.5,
        softcap=20.0 if rng.random() < 0.2 else 0.0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_equals_numpy(built: Path, backend: Any, kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(10):
        node = random_node(GGMLType[kind], rng)
        assert error(built, backend, node) < 1, node


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_the_shape_of_deepseek(built: Path, backend: Any, kind: str) -> None:
    """A latent of 512 and a rope key of 64 values, 16 heads: more scratch memory than any other shape here."""
    rng = np.random.default_rng(7)
    for tokens in (1, 9):
        q, k = (
            rng.standard_normal((1, *shape, 576)).astype(np.float32) for shape in ((16, tokens), (1, 700))
        )
        mask = np.where(np.arange(700) > 650 + np.arange(tokens)[:, None], -np.inf, 0.0)[None, None]
        node = Node(q, k, None, GGMLType[kind], GGMLType[kind], 512, mask, scale=192**-0.5)
        assert error(built, backend, node) < 1


def test_many_threads_share_one_query(built: Path) -> None:
    """78 stretches of one query's cache, more than the 64 that an earlier version had room for."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, rows, 32)).astype(np.float32) for rows in (1, 40_000))
    node = Node(q, k, None, GGMLType.F16, GGMLType.F16, 32, scale=32**-0.5)
    assert error(built, load_backend(built, n_threads=40), node) < 1


def test_what_it_does_not_compute_is_left_to_ggml(backend: Any) -> None:
    """Ternary weights are no cache type here."""
    q, k = (np.zeros((1, 1, rows, 256), np.float32) for rows in (1, 32))
    with pytest.raises(BackendError, match="does not compute"):
        attend(backend, Node(q, k, None, GGMLType.TQ2_0, GGMLType.TQ2_0, 256))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_the_model_says_what_it_said(
    built: Path, model: str, request: pytest.FixtureRequest, edgekv_logits: Callable[..., Any]
) -> None:
    """Prefill of 300 tokens, then single ones, f32 weights: near stock with an f16 cache, and with a q8_0 cache no
    further from stock's f16 than stock's own q8_0 is."""
    path = request.getfixturevalue(model)

    def logits(cache_type: str, kernel: str) -> Any:
        return log_softmax(edgekv_logits(path, cache_type, kernel, built))

    def kl(found: Any) -> float:
        return float(np.mean(kl_rows(wanted, found)))

    wanted = logits("f16", "stock")
    # Random weights feel bfloat16 more than a real model's do (docs/kernel.md).
    assert kl(logits("f16", "edgekv")) < (2e-4 if multiplies_bfloat16(built) else 5e-5)
    pairs = ("q8_0/q4_0", "q4_0/f16") if model == "tiny_llama" else ()
    for cache_type in ("q8_0", *pairs):
        assert kl(logits(cache_type, "edgekv")) < 1.5 * kl(logits(cache_type, "stock")) + 1e-5


def test_a_format_without_rows_in_the_kernel_runs_in_llama_cpp(
    built: Path, tiny_llama: Path, edgekv_logits: Callable[..., Any]
) -> None:
    """The engine says so, too."""
    stock = edgekv_logits(tiny_llama, "q8_0/mxfp4", "stock", built)
    mixed = edgekv_logits(tiny_llama, "q8_0/mxfp4", "edgekv", built, runs="stock")
    np.testing.assert_array_equal(mixed, stock)


def multiplies_bfloat16(built: Path) -> bool:
    some = np.zeros((1, 1, 1, 32), np.float32)
    return bool(rounding(built, Node(some, some, None, GGMLType.F16, GGMLType.F16, 32)) & BFLOAT16)


@pytest.fixture
def edgekv_logits(tmp_path: Path) -> Callable[..., Any]:
    """Logits of a model in a process of its own: a kernel that is loaded stays."""

    def run(path: Path, cache_type: str, kernel: str, built: Path, runs: str = "") -> Any:
        out = tmp_path / f"{kernel}.npy"
        code = (
            "import sys, numpy as np\nfrom pathlib import Path\nfrom edgekv.backends.open import open_backend\n"
            "from edgekv.backends.llama_cpp.library import llama\n"
            "b = open_backend(Path(sys.argv[1]), 'llama.cpp', n_ctx=512, cache_type=sys.argv[2], n_threads=2)\n"
            "assert b.kernel == sys.argv[4], b.kernel\n"
            "tokens = np.random.default_rng(0).integers(0, b.n_vocab, 340).tolist()\n"
            "rows = [b.prefill_all(tokens[:300]), *(b.decode(t)[None] for t in tokens[300:])]\n"
            "np.save(sys.argv[3], np.concatenate(rows))\n"
        )
        environment = os.environ | {KERNEL_VARIABLE: kernel, "XDG_CACHE_HOME": str(built.parents[2])}
        command = [
            sys.executable,
            "-P",
            "-c",
            code,
            str(path),
            cache_type,
            str(out),
            runs or kernel,
        ]
        subprocess.run(command, check=True, env=environment, timeout=120)
        return np.load(out)

    return run


def compiled_program(folder: Path, compiler: str, *flags: str) -> Path:
    """kernel_problem.cpp with the kernel's sources."""
    program = folder / "problem"
    shared = [f for f in FLAGS if f != "-shared" and not f.startswith(("-march", "-mcpu"))]
    sources = [PROGRAM, HERE / "attention.cpp", HERE / "rows.cpp"]
    command = [compiler, *shared, *flags, f"-I{HERE}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def error_of_program(command: list[str], node: Node, threads: int) -> float:
    """How far the program is from NumPy for one node, in output or mass, of what is tolerable."""
    done = subprocess.run(command, input=problem(node, threads), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    rounds = done.stdout[0]
    found, expected = (
        np.frombuffer(done.stdout, np.float32, offset=1),
        wanted(node, bool(rounds & EIGHT_BITS)),
    )
    parts = zip(np.split(found, [expected[0].size]), expected, strict=True)
    return max(float(np.linalg.norm(x - y.ravel()) / np.linalg.norm(y)) for x, y in parts) / tolerance(rounds)


def problem(node: Node, threads: int, mass: bool = True) -> bytes:
    """What the program reads."""
    mask = np.zeros((0, 0, 0, 0), np.float16) if node.mask is None else node.mask.astype(np.float16)
    n, heads, tokens, width = node.q.shape
    numbers = [
        n,
        heads,
        node.k.shape[1],
        tokens,
        node.k.shape[2],
        width,
        node.width_v,
        node.type_k,
        node.type_v,
    ]
    numbers += [node.v is None, mask.shape[1], mask.shape[0], threads, mass]
    parts = [np.array(numbers, np.int64), np.array([node.scale, node.softcap], np.float32), node.q]
    parts += [stored_as(node.k, node.type_k)] + ([] if node.v is None else [stored_as(node.v, node.type_v)])
    parts += [mask, np.array([node.sinks is not None], np.uint8)] + (
        [] if node.sinks is None else [node.sinks]
    )
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def wanted(node: Node, rounds_queries: bool) -> tuple[Any, Any]:
    """The output, and the mass of each row."""
    exact = replace(node, q=rounded(node.q)) if rounds_queries else node
    return twin(exact), softmax_twin(exact).sum((0, 1, 2))


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over random shapes of every type, in buffers of their size."""
    flags = ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    program = compiled_program(tmp_path, kernel_build._compiler(), *flags)
    rng = np.random.default_rng(5)
    for kind in (GGMLType[name] for name in KINDS):
        for threads in (1, 3):
            assert error_of_program([str(program)], random_node(kind, rng), threads) < 1


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which("qemu-aarch64")), reason="no emulated ARM here"
)
@pytest.mark.parametrize("machine", ["armv8-a", "armv8.2-a+dotprod"])
def test_on_an_emulated_arm(tmp_path: Path, machine: str) -> None:
    """Plain NEON (Pi 3, 4, Zero 2 W) and dot products (Pi 5)."""
    program = compiled_program(tmp_path, ARM_COMPILER, f"-march={machine}", "-static", "-Werror")
    rng = np.random.default_rng(6)
    for kind in (GGMLType[name] for name in KINDS):
        assert error_of_program(["qemu-aarch64", str(program)], random_node(kind, rng), 2) < 1


class TestWhereItCannotBeHad:
    @pytest.fixture(autouse=True)
    def fresh_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv(KERNEL_VARIABLE, raising=False)

    def test_not_built_is_stock_unless_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not built_path()
        assert chosen_kernel() == "stock"
        monkeypatch.setenv(KERNEL_VARIABLE, "edgekv")
        with pytest.raises(BackendError, match="run `edgekv kernel` once"):
            chosen_kernel()
        monkeypatch.setenv(KERNEL_VARIABLE, "fast")
        with pytest.raises(InputError, match="takes edgekv or stock"):
            chosen_kernel()

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(BackendError, match=r"no C\+\+ compiler .* or go on without"):
            build()

    def test_a_compiler_that_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_build, "FLAGS", (*FLAGS, "-fno-such-flag"))
        with pytest.raises(BackendError, match=r"compiling of the attention kernel failed: .*no-such-flag"):
            build()
        assert not built_path()

    def test_a_file_that_somebody_else_put_there(self, built: Path, tiny_llama: Path) -> None:
        path = build_path()
        path.parent.mkdir(parents=True)
        shutil.copy(built, path)
        assert not built_path(), "it has passed no check here"
        shutil.copy(built.with_suffix(".sha256"), path.with_suffix(".sha256"))
        assert built_path()
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        assert not built_path(), "one byte is another"
        assert chosen_kernel() == "stock"

    def test_a_read_only_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "edgekv").write_text("")
        with pytest.raises((BackendError, InputError)):
            build()


def test_nodes_are_computed_by_it(built: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parents[2]))
    monkeypatch.setenv(KERNEL_VARIABLE, "edgekv")
    counter = ctypes.CDLL(str(built)).edgekv_n_computed
    counter.restype = ctypes.c_int64
    engine = open_backend(tiny_llama, "llama.cpp", n_ctx=256, n_threads=1)
    before = counter()
    engine.decode(5)
    engine.close()
    assert counter() - before == 3, "one node per layer"


def test_an_engine_in_a_child_says_which(
    built: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a restart without it, which is how `edgekv chat` goes on when an engine died."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parents[2]))
    monkeypatch.setenv(KERNEL_VARIABLE, "edgekv")
    engine = IsolatedBackend(tiny_llama, "llama.cpp", n_ctx=256, n_threads=1)
    assert engine.kernel == "edgekv"
    monkeypatch.setenv(KERNEL_VARIABLE, "stock")
    engine.restart()
    assert engine.kernel == "stock"
    engine.close()
