"""Names of choices that lie in the environment; apart, as the command line needs them before any engine."""

from typing import Literal, get_args

Kernel = Literal["edgekv", "stock"]  # edgekv.backends.llama_cpp.kernel, or llama.cpp's own
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
KERNEL_VARIABLE = (
    "EDGEKV_KERNEL"  # of the environment: the kernel that a process and its children are to take
)
RPC_VARIABLE = "EDGEKV_RPC"  # likewise: the workers that a model's layers are to lie on, as host:port,...
