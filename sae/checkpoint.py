"""The checkpoint of a training run: one safetensors file, so that weights and position are always of the same moment."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache.errors import HearsaeError
from cache.location import Location, local_copy, put


class State(NamedTuple):
    """Everything that the next step of one SAE depends on."""

    tensors: dict[str, Tensor]
    running: dict[str, float]


class Checkpoint(NamedTuple):
    """Everything that the next step of a run depends on."""

    position: int
    """Rows consumed."""
    seconds: float
    """Spent so far."""
    waited: float
    """Of those, spent waiting for rows."""
    states: Sequence[State]
    """Of each SAE of the grid."""


def save_checkpoint(path: Location, identity: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Writes it atomically in place of the last one. identity: what a run must agree in to go on from it; JSON."""
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, state in enumerate(checkpoint.states)
        for name, tensor in state.tensors.items()
    }
    facts = checkpoint._asdict() | {"identity": identity, "states": [state.running for state in checkpoint.states]}
    put(path, safetensors.torch.save(tensors, metadata={"hearsae": json.dumps(facts)}))


def load_checkpoint(path: Location, identity: dict[str, Any]) -> Checkpoint | None:
    """The last checkpoint, or None. Raises HearsaeError if it is damaged or of another run."""
    if not path.exists():
        return None
    try:
        with local_copy(path) as copy, safe_open(copy, "pt") as file:
            facts = json.loads(file.metadata()["hearsae"])
            refuse_difference(path, facts.pop("identity"), identity)
            tensors: list[dict[str, Tensor]] = [{} for _ in facts["states"]]
            for key in file.keys():  # noqa: SIM118 - it is no dict
                number, _, name = key.partition(".")
                tensors[int(number)][name] = file.get_tensor(key)
        states = [State(of_one, running) for of_one, running in zip(tensors, facts.pop("states"), strict=True)]
        return Checkpoint(states=states, **facts)
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise HearsaeError(f"{path} is damaged ({error}): remove it to train from the start") from error


def refuse_difference(path: Location, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raises HearsaeError, naming the first difference, unless both are of one run."""
    for name in have | want:
        if have.get(name) != want.get(name):
            raise HearsaeError(f"{path} is of another run: {name} is {have.get(name)} there and {want.get(name)} here; use another --out")
