"""Worker processes of the bench: each model has its own resident set, and a crash ends only its own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekv.backends.isolated.child import Child
from edgekv.errors import BackendError, EdgeKVError


class WorkerProcess(Child):
    """One edgekv.devices.bench.worker_child; a context manager that ends it."""

    def __init__(self, label: str) -> None:
        self.label = label
        super().__init__("edgekv.devices.bench.worker_child", out_of_memory="take a smaller context or model")

    def ask(
        self, do: str, on_message: Callable[[dict[str, Any]], None] | None = None, /, **arguments: Any
    ) -> Any:
        """Send one request and wait for its answer.

        Raises:
            BackendError: the worker refused or died; the message gives the cause.
        """
        try:
            return super().ask(do, on_message, **arguments)
        except EdgeKVError as error:
            raise BackendError(f"{self.label}: {error}") from error
