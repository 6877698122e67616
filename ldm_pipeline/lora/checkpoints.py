"""A model folder's weights, one at a time and without building the model.

A folder in Diffusers layout has a folder for each component, with safetensors files (one, or
several shards with an index) whose keys are the modules' names with `.weight` behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.fitting import Modules, Shape
from ldm_pipeline.lora.targets import COMPONENTS, TEXT_MODEL
from ldm_pipeline.models import folders
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.trust import CLASSES, PICKLES, SAFE
from ldm_pipeline.replacing import replacing

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = ".weight"
EMBEDDINGS = "embeddings."
"""Where CLIP keeps tables of words and places, whose weights look like those of linear modules."""


@dataclass(frozen=True)
class Place:
    """Where the tensor of a key lies, and its shape."""

    file: Path
    key: str
    shape: Shape


@dataclass(frozen=True)
class ModelFolder:
    """The networks in a model folder that a LoRA can adapt: each tensor's place, by component and
    name; text encoders' without `text_model.`"""

    folder: Path
    tensors: Mapping[str, Mapping[str, Place]]

    @property
    def modules(self) -> Modules:
        """The modules that can be adapted, as `fitting` takes them."""
        return {
            component: {
                key.removesuffix(WEIGHT): place.shape
                for key, place in places.items()
                if key.endswith(WEIGHT) and len(place.shape) in (2, 4) and EMBEDDINGS not in key
            }
            for component, places in self.tensors.items()
        }

    def weight(self, component: str, name: str) -> Tensor | None:
        """W of a module, as it is stored; None for a module that is not there."""
        return self.tensor(component, f"{name}{WEIGHT}")

    def tensor(self, component: str, key: str) -> Tensor | None:
        """One tensor; None where there is none."""
        from safetensors import safe_open

        place = self.tensors.get(component, {}).get(key)
        if place is None:
            return None
        with safe_open(place.file, "pt") as opened:
            found: Tensor = opened.get_tensor(place.key)
        return found


def open_model_folder(folder: Path) -> ModelFolder:
    """The model in `folder`, its headers read and nothing else.

    Raises `UserError` for a folder that is no pipeline or not safe to open (a copy of it would
    follow its links), and for files that are damaged.
    """
    folders.check(folder, CLASSES)
    tensors: dict[str, dict[str, Place]] = {}
    for component in COMPONENTS:
        for file in folders.weight_files(folder / component):
            for key, shape in read_header(file).shapes.items():
                name = key.removeprefix(TEXT_MODEL)
                tensors.setdefault(component, {})[name] = Place(file, key, shape)
    if not tensors:
        raise UserError(f"{folder} holds no safetensors weights of {', '.join(COMPONENTS)}")
    return ModelFolder(folder, tensors)


def rewritten(
    checkpoint: ModelFolder, out: Path, change: Callable[[str, str, Tensor], Tensor]
) -> Path:
    """A copy of the folder at `out` with every W as `change(component, name, W)` has it.

    Files that hold none of them are copied as they are. The copy appears whole or not at all.
    Raises `UserError` where it cannot be written, or would hold numbers that are not finite.
    """
    with replacing(out) as temporary:
        try:
            shutil.copytree(checkpoint.folder, temporary, ignore=_not_ours(checkpoint))
        except shutil.Error as error:  # a list of (from, to, why)
            raise OSError(error.args[0][0][2]) from error
        for file, keys in _by_file(checkpoint):
            target = temporary / file.relative_to(checkpoint.folder)
            _write_changed(target, file, keys, change)
    return out


def _write_changed(
    target: Path,
    file: Path,
    keys: Mapping[str, tuple[str, str]],
    change: Callable[[str, str, Tensor], Tensor],
) -> None:
    """Write a file's contents with the tensors of `keys` (key -> component, name) changed."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(file, "pt") as opened:
        texts = opened.metadata() or {}
        for key in opened.keys():  # noqa: SIM118 (it is no mapping)
            w = opened.get_tensor(key)
            tensors[key] = change(*keys[key], w).to(w.dtype) if key in keys else w
            if key in keys and not tensors[key].isfinite().all():
                kind = str(w.dtype).removeprefix("torch.")
                raise UserError(
                    f"{'.'.join(keys[key])} would hold numbers that are not finite in {kind};"
                    " give the LoRA a smaller weight"
                )
    try:
        save_file(tensors, target, texts)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error


def _by_file(checkpoint: ModelFolder) -> Iterator[tuple[Path, dict[str, tuple[str, str]]]]:
    """Each file of weights, with the modules whose W it holds by key."""
    files: dict[Path, dict[str, tuple[str, str]]] = {}
    modules = checkpoint.modules
    for component, places in checkpoint.tensors.items():
        for key, place in places.items():
            name = key.removesuffix(WEIGHT)
            own = files.setdefault(place.file, {})
            if name != key and name in modules[component]:
                own[place.key] = component, name
    yield from files.items()


def _not_ours(checkpoint: ModelFolder) -> Callable[[str, list[str]], set[str]]:
    """For `copytree`: the weights that are written anew, and other variants of them, which would
    go on holding the old ones."""
    own = {place.file.parent for places in checkpoint.tensors.values() for place in places.values()}

    def ignore(folder: str, names: list[str]) -> set[str]:
        if Path(folder) not in own:
            return set()
        weights = (SAFE, *PICKLES)
        return {name for name in names if name.endswith(weights)}

    return ignore
