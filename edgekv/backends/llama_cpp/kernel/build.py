"""Builds of the attention kernel: compiled for this machine and this llama.cpp, checked, kept in the cache folder.

A build's name is made of the sources, the flags, llama.cpp's library and the CPU's features, so that a change of any
of them asks for a new one; the library itself compares ggml's version and layout when it is loaded. Beside a build
lies the SHA-256 that it had when it passed its check: a file that somebody else put there, or that a disk damaged, is
not loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

from platformdirs import user_cache_path

from edgekv.backends.llama_cpp.kernel.ggml import ggml
from edgekv.backends.llama_cpp.library import llama
from edgekv.errors import BackendError, OutputError
from edgekv.files import atomic_path, file_sha256
from edgekv.host.isa import cpu_flags, engine_library

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("attention.cpp", "backend.cpp", "rows.cpp"))
HEADERS = tuple(HERE / name for name in ("attention.h", "rows.h", "vectors.h"))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wconversion", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC's own AVX-512 headers
    "-mcpu=native" if platform.machine() == "aarch64" else "-march=native",
)
CHECK_TIMEOUT_S = 120


def build_path() -> Path:
    """Where the build for this machine and this llama.cpp lies, or would.

    Raises:
        BackendError: llama-cpp-python is not installed.
    """
    library = engine_library()
    if library is None:
        raise BackendError(
            "the attention kernel is for llama.cpp, which is not installed: pip install 'edgekv[llama]'"
        )
    engine = f"{library} {library.stat().st_size} {library.stat().st_mtime_ns}"
    parts = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    parts += [" ".join(FLAGS).encode(), " ".join(sorted(cpu_flags())).encode(), engine.encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return user_cache_path("edgekv") / "kernel" / f"attention-{digest}-{platform.machine()}.so"


def built_path() -> Path | None:
    """The build, if it is there and is the file that passed its check; raises as `build_path` does."""
    path = build_path()
    try:
        return path if _mark(path).read_text(encoding="ascii") == file_sha256(path) else None
    except (OSError, BackendError, ValueError):
        return None


def build() -> Path:
    """Compile the kernel and compare it with NumPy in a process of its own; takes seconds.

    Raises:
        BackendError: llama-cpp-python or a compiler is not there, the compiler refused, or the check failed.
        OutputError: the cache folder cannot be written.
    """
    path = build_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {path.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with atomic_path(path, force=True) as partial:
        _run(
            [_compiler(), *FLAGS, *_defines(), *map(str, SOURCES), *_library(), "-o", str(partial)],
            "compiling",
        )
        _run(
            [sys.executable, "-P", "-m", "edgekv.backends.llama_cpp.kernel.check", str(partial)], "the check"
        )
    with atomic_path(_mark(path), force=True) as partial:
        partial.write_text(file_sha256(path), encoding="ascii")
    return path


def _mark(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if name and (found := shutil.which(name)):
            return found
    raise BackendError(
        "there is no C++ compiler for the attention kernel; install one (apt-get install g++), or go on without: "
        "llama.cpp's own attention is slower with a long cache"
    )


def _defines() -> list[str]:
    """ggml's headers, and what tells its ABI: a library of another ggml declines to be loaded."""
    include = Path(llama().__file__).parents[1] / "include"
    if not (include / "ggml-backend.h").is_file():
        raise BackendError(
            f"ggml's headers are not in {include}; install llama-cpp-python 0.3.36 from its source"
        )
    return [
        f"-I{include}",
        f'-DEDGEKV_GGML_VERSION="{ggml("ggml_version")().decode()}"',
        f"-DEDGEKV_TENSOR_OVERHEAD={ggml('ggml_tensor_overhead')()}",
    ]


def _library() -> list[str]:
    return [f"-L{Path(llama()._lib._name).parent}", "-lggml-base", "-ldl"]


def _run(command: list[str], what: str) -> None:
    import subprocess  # 1.5 MB that a process which only loads a build does without

    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:] or [
            f"exit code {error.returncode}"
        ]
        raise BackendError(
            f"{what} of the attention kernel failed: {last[0]}; llama.cpp runs without it"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(
            f"{what} of the attention kernel failed: {error}; llama.cpp runs without it"
        ) from error
