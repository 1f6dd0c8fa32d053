"""Which programs the attention kernel lets load it: those on the ggml that it was built for, in shared libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgekv.backends.llama_cpp.kernel import build as kernel_build
from edgekv.backends.llama_cpp.kernel.build import FLAGS, SOURCES
from edgekv.backends.llama_cpp.library import llama

LIBRARIES = Path(llama()._lib._name).parent
# Loads a plug-in as ggml/src/ggml-backend-reg.cpp does; of ggml it knows nothing, or the version alone.
PROGRAM = """
#include <dlfcn.h>
#include <cstdio>
#ifdef ON_GGML
extern "C" const char * ggml_version(void);
#else
static const char * ggml_version() { return "its own"; }
#endif
int main(int, char ** paths) {
    std::fprintf(stderr, "ggml %s\\n", ggml_version());
    void * file = dlopen(paths[1], RTLD_NOW | RTLD_LOCAL);
    if (!file) return std::fprintf(stderr, "%s\\n", dlerror()), 2;
    return reinterpret_cast<void * (*)()>(dlsym(file, "ggml_backend_init"))() ? 0 : 1;
}
"""


def compiled(folder: Path, *flags: str) -> Path:
    source, program = folder / "program.cpp", folder / "program"
    source.write_text(PROGRAM)
    subprocess.run([kernel_build._compiler(), str(source), *flags, "-ldl", "-o", str(program)], check=True)
    return program


def loaded(program: Path, plugin: Path) -> tuple[int, str]:
    """The program's exit code, 0 where the plug-in agreed, and its words."""
    done = subprocess.run(
        [str(program), str(plugin)],
        env={"LD_LIBRARY_PATH": str(LIBRARIES)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def on_ggml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = (f"-L{LIBRARIES}", f"-Wl,-rpath-link,{LIBRARIES}", "-Wl,--no-as-needed", "-lggml-base")
    return compiled(tmp_path_factory.mktemp("program"), "-DON_GGML", *library)


def test_a_program_on_the_same_ggml(built: Path, on_ggml: Path) -> None:
    code, said = loaded(on_ggml, built)
    assert code == 0
    assert "EdgeKV" not in said


def test_a_program_with_ggml_in_itself_is_left_alone(built: Path, tmp_path: Path) -> None:
    """Even where the library finds another copy of ggml, whose registry and buffers are not the program's."""
    code, said = loaded(compiled(tmp_path), built)
    assert code == 1
    assert "leaves this program alone: it holds a ggml of its own" in said


def test_another_ggml_is_left_alone(on_ggml: Path, tmp_path: Path) -> None:
    defines = [x.replace('EDGEKV_GGML_VERSION="', 'EDGEKV_GGML_VERSION="9.') for x in kernel_build._defines()]
    library = tmp_path / "other.so"
    command = [kernel_build._compiler(), *FLAGS, "-O0", *defines, *map(str, SOURCES)]
    subprocess.run([*command, *kernel_build._library(), "-o", str(library)], check=True)
    code, said = loaded(on_ggml, library)
    assert code == 1
    assert "was built for ggml 9." in said
