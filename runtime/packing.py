"""Packs the linear layers of a model while it is being loaded (`kernels.packed_linear`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor

from runtime.models import CausalLM
from runtime.models.layers import Linear, Targets


class Packing:
    """Packs each linear layer once all its parts are read, and lets go of what was read.

    Fresh memory is only taken as it is written, so the peak is the packed model and one matrix; a
    head whose weights embed the tokens too is kept both ways.
    """

    def __init__(self, model: CausalLM, targets: Targets) -> None:
        """``targets`` lose the parts of what is packed; nobody else may hold them then."""
        self._targets = targets
        self._layers = {
            _storage(layer.weight): layer
            for layer in linear_layers(model)
            if layer.packing is not None and isinstance(layer.weight, Tensor)
        }
        self._parts: dict[int, set[str]] = defaultdict(set)  # of each layer's weight, not read yet
        self._read: dict[int, list[str]] = defaultdict(list)
        for name, target in targets.items():
            if _storage(target) in self._layers:
                self._parts[_storage(target)].add(name)

    def filled(self, name: str) -> None:
        """One tensor of the checkpoint has been read."""
        target = self._targets.get(name)
        if target is None or _storage(target) not in self._layers:
            return
        storage = _storage(target)
        self._parts[storage].remove(name)
        self._read[storage].append(name)
        if not self._parts[storage]:
            for part in self._read.pop(storage):
                del self._targets[part]
            self._layers.pop(storage).pack()


def bytes_added(model: CausalLM) -> int:
    """What packing will add to the bytes of a model's parameters; below 0 where it quantizes."""
    added = 0
    for layer in linear_layers(model):
        if layer.packing is not None and isinstance(layer.weight, Tensor):
            added += layer.packed_nbytes - (0 if layer.is_shared else layer.weight.nbytes)
    return added


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def linear_layers(part: object) -> Iterator[Linear]:
    """Every linear layer in ``part``, found by its attributes."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from linear_layers(item)
    elif type(part).__module__.startswith("runtime.models"):
        for attribute in getattr(part, "__dict__", {}).values():
            yield from linear_layers(attribute)
