"""A module here is a module there: how two layouts name the parts of one network.

Legend
    here, there   Diffusers' layout, the original one
    leaf          what follows a module's name in a tensor's: "weight", "bias", or a whole subtree
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ldm_pipeline.models.original.tensors import Stored

Tensors = Mapping[str, Stored]


class NameMap(Protocol):
    """How one network's tensors change their names, and where it must be their form."""

    def to_original(self, here: Tensors) -> dict[str, Stored]:
        """The tensors of a Diffusers folder under original names; those that have none are not."""
        ...

    def to_diffusers(self, there: Tensors) -> dict[str, Stored]:
        """The tensors of an original file under Diffusers' names; those that have none are not."""
        ...


@dataclass(frozen=True)
class Names:
    """Pairs of module names (here, there); a module that is not named is under one that is.

    The weights of the modules in `pointwise` are matrices here and 1 x 1 convolutions there.
    """

    pairs: Mapping[str, str]
    pointwise: frozenset[str] = field(default_factory=frozenset)

    def to_original(self, here: Tensors) -> dict[str, Stored]:
        """See `NameMap`."""
        found = {}
        for key, tensor in here.items():
            name = renamed(key, self.pairs)
            if name is None:
                continue
            if self._is_matrix(key) and len(tensor.shape) == 2:
                tensor = tensor.shaped((*tensor.shape, 1, 1))
            found[name] = tensor
        return found

    def to_diffusers(self, there: Tensors) -> dict[str, Stored]:
        """See `NameMap`."""
        back = {other: module for module, other in self.pairs.items()}
        found = {}
        for key, tensor in there.items():
            name = renamed(key, back)
            if name is None:
                continue
            if self._is_matrix(name):
                tensor = tensor.shaped(tensor.shape[:2])
            found[name] = tensor
        return found

    def _is_matrix(self, key: str) -> bool:
        module, _, leaf = key.rpartition(".")
        return leaf == "weight" and module in self.pointwise


def renamed(key: str, pairs: Mapping[str, str]) -> str | None:
    """`key` with the longest module name in `pairs` that it begins with exchanged; else None."""
    module = key
    while module:
        if module in pairs:
            return pairs[module] + key[len(module) :]
        module = module.rpartition(".")[0]
    return None
