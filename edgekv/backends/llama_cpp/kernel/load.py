"""Which attention llama.cpp runs: its own, or the kernel, loaded once per process before a context is made.

The choice is one for a process and all its children, so it lies in the environment: EDGEKV_KERNEL is "edgekv", "stock",
or not set, which takes the kernel where it is built. `--kernel` of the command line sets it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from edgekv.backends.kernel_names import KERNEL_VARIABLE, KERNELS, Kernel
from edgekv.backends.llama_cpp.kernel.build import built_path
from edgekv.backends.llama_cpp.kernel.ggml import ggml
from edgekv.backends.llama_cpp.library import has_gpu
from edgekv.errors import BackendError, InputError


def chosen_kernel() -> Kernel:
    """The attention that a CPU's llama.cpp would run in this process; nothing native is loaded to find out.

    Raises:
        InputError: EDGEKV_KERNEL is something else.
        BackendError: the kernel is asked for and not built.
    """
    return "edgekv" if _chosen_build() else "stock"


def use_kernel() -> Kernel:
    """Load the kernel if it is chosen; which attention the contexts made from here on run.

    On a GPU llama.cpp runs its own. Once loaded the kernel stays for the life of the process, as open contexts use it.

    Raises: as `chosen_kernel` does; BackendError: ggml refuses the kernel.
    """
    if has_gpu() or not (path := _chosen_build()):
        return "stock"
    _load_once(path)
    return "edgekv"


def _chosen_build() -> Path | None:
    """The build to load; None for llama.cpp's own attention."""
    wanted = os.environ.get(KERNEL_VARIABLE) or None
    if wanted not in (None, *KERNELS):
        raise InputError(f"{KERNEL_VARIABLE} is {wanted!r}; it takes {' or '.join(KERNELS)}, or is not set")
    if wanted == "stock":
        return None
    path = built_path()
    if wanted and not path:
        raise BackendError(
            "the attention kernel is not built; run `edgekv kernel` once, or leave out --kernel"
        )
    return path


@functools.cache
def _load_once(path: Path) -> None:
    if not ggml("ggml_backend_load")(str(path).encode()):
        raise BackendError(
            "ggml refuses the attention kernel; build it again with `edgekv kernel`, or take --kernel stock"
        )
