"""Training state on disk: the trained tensors in full precision, the optimizer's moments and the record.

Written beside its final place and renamed, so that a kill at any moment leaves the state before or after.
Safetensors, not pickle: a state from elsewhere cannot run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgekv.documents import decode, dumps, parse
from edgekv.errors import InputError
from edgekv.files import atomic_path
from edgekv.heal.recipe import HealedRecord, drop_retired

STATE_KEY = "edgekv.heal.state"


@dataclass(frozen=True)
class State:
    """Where a training stands after `record.steps_done` steps."""

    record: HealedRecord
    micro_sequences: int  # how batches are split: the order of additions decides the last bits
    optimizer_since: int  # the step that the optimizer started at: not 0 if it was lost once
    params: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    loss_sum: Tensor  # of the steps since the curve's last point


def save_state(path: Path, state: State) -> None:
    """Write a state, replacing the one before.

    Raises:
        OutputError: the folder is missing or the disk is full.
    """
    tensors = {f"param.{name}": tensor.detach() for name, tensor in state.params.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in state.optimizer.items()}
    tensors["loss_sum"] = state.loss_sum
    document = dumps(
        {
            "record": state.record,
            "micro_sequences": state.micro_sequences,
            "optimizer_since": state.optimizer_since,
        }
    )
    with atomic_path(path, force=True) as partial:
        save_file(tensors, partial, {STATE_KEY: document})


def load_state(path: Path) -> State:
    """Read what `save_state` wrote; tensors on the CPU.

    Raises:
        InputError: the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = parse((file.metadata() or {})[STATE_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        drop_retired(document["record"], path)
        record = decode(HealedRecord, document["record"])
        numbers = int(document["micro_sequences"]), int(document["optimizer_since"])
        loss_sum = tensors.pop("loss_sum")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a training state ({error}); delete it to start anew") from error
    params = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    moments = {
        name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")
    }
    return State(record, *numbers, params, moments, loss_sum)
