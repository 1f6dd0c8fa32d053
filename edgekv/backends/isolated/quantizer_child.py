"""The child process of edgekv.backends.isolated.quantizer: one native job, told in lines of JSON.

Run as `python -m edgekv.backends.isolated.quantizer_child JOB`, where JOB is a JSON object with an "action". Lines are
{"done": n, "total": n}, and at the end {"ok": true} or {"error": [class, message]}. With "waits" in the job it
says {"wait": tensor} and goes on when a line comes in.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.backends.llama_cpp.importance import measure_importance, sample_text
from edgekv.backends.llama_cpp.quantize import quantize_file
from edgekv.errors import BackendError, EdgeKVError

Send = Callable[[dict[str, Any]], None]


def main(job: dict[str, Any]) -> None:
    """Do the job and tell how it went."""
    lines = os.dup(1)
    os.dup2(2, 1)  # whatever native code prints must not get between the lines

    def send(message: dict[str, Any]) -> None:
        try:
            os.write(lines, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            os._exit(1)  # nobody waits any more; an exception would be lost in native code

    try:
        ACTIONS[job.pop("action")](job, send)
    except EdgeKVError as error:
        send({"error": [type(error).__name__, str(error)]})
    except Exception as error:
        send({"error": [BackendError.__name__, f"the engine failed: {type(error).__name__}: {error}"]})
    else:
        send({"ok": True})


def _progress(send: Send) -> Callable[[int, int], None]:
    return lambda done, total: send({"done": done, "total": total})


def _sample(job: dict[str, Any], send: Send) -> None:
    prompts = np.load(job["prompts"])
    windows = sample_text(
        Path(job["model"]), prompts, job["length"], job["seed"], job["n_threads"], _progress(send)
    )
    np.save(job["windows"], windows)


def _measure(job: dict[str, Any], send: Send) -> None:
    windows = np.load(job["windows"])
    found: dict[str, Any] = {
        **measure_importance(Path(job["model"]), windows, job["n_threads"], _progress(send))
    }
    np.savez(job["importance"], **found)


def _quantize(job: dict[str, Any], send: Send) -> None:
    importance = {}
    if job["importance"]:
        with np.load(job["importance"]) as stored:
            importance = {name: np.ascontiguousarray(stored[name]) for name in stored.files}

    def wait(name: str) -> None:
        send({"wait": name})
        if not os.read(0, 1):
            os._exit(1)  # nobody writes the tensor any more

    quantize_file(
        Path(job["model"]),
        Path(job["output"]),
        job["file_type"],
        importance,
        job["keep"],
        job["n_threads"],
        _progress(send),
        wait if job["waits"] else None,
    )


ACTIONS = {"sample": _sample, "measure": _measure, "quantize": _quantize}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
