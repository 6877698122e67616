"""What `--model` may name: the bundled model, a folder, a single file, or a model of the hub.

Nothing is loaded here, and of a hub model no more is downloaded than what it says of itself; a name
that cannot lead to a model is refused at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.commands.flags import in_flags
from ldm_pipeline.errors import UserError
from ldm_pipeline.models import bundled, folders, small_decoder
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.hub import cached, fetched, fetched_index, offline
from ldm_pipeline.models.original import note
from ldm_pipeline.models.original.checkpoint import check_name
from ldm_pipeline.models.original.configs import GUIDED
from ldm_pipeline.models.original.families import FIRST, UNET, family_of
from ldm_pipeline.models.trust import SAFE, read_json
from ldm_pipeline.values import check_path

if TYPE_CHECKING:
    from ldm_pipeline.pipeline import LatentDiffusionPipeline

BUNDLED = "bundled"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TOLD = "attn2.to_k.weight"
"""The end of the keys of a UNet's weights that read the texts."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A model that can be opened: `name` as it was given; `folder` and `file` None for a hub id."""

    name: str
    folder: Path | None
    file: Path | None = None

    @property
    def bundled(self) -> bool:
        """Whether this is the model that comes with the package."""
        return self.name == BUNDLED


def find(name: str) -> Source:
    """The model that `name` stands for; `UserError` where there is none.

    A name with one slash is a hub id unless a folder of that name, or of its first half, is
    here. Offline (HF_HUB_OFFLINE), a hub id has to be in the cache.
    """
    if name == BUNDLED:
        return Source(name, bundled.folder())
    check_path("model", name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        folders.index(folder)
        return Source(name, folder)
    if folder.is_file():
        check_name(folder)
        family_of(folder, read_header(folder).shapes)
        return Source(name, None, folder)
    if folder.suffix == SAFE:
        raise UserError(f"there is no file {name}")
    if not HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise UserError(
            f"there is no model folder {name}, and a hub id is written owner/name; a model is a"
            " folder in Diffusers layout, a .safetensors file, a hub id or bundled"
        )
    if offline() and cached(name) is None:
        raise UserError(
            f"{name} is no folder here, and as a hub id it is not in the cache: "
            "HF_HUB_OFFLINE forbids downloading it"
        )
    return Source(name, None)


def need_folder(source: Source) -> None:
    """Refuse a single file where a model's folder is needed."""
    if source.file is not None:
        raise UserError(
            f"{source.name} is a single file, and a model's folder is needed; ldm convert"
            f" {source.name} FOLDER makes one"
        )


def find_decoder(name: str | None, source: Source) -> Path | None:
    """The small autoencoder that --decoder names; `UserError` where there is none."""
    with in_flags():
        return None if name is None else small_decoder.find(name, source.bundled)


def unet_config(source: Source) -> dict[str, Any] | None:
    """What the model's UNet says of itself; None where nothing is told.

    Of a single file that others wrote only the widths of what the UNet is told are read, from its
    tensors' shapes: of the texts, of a full LCM's guidance, and of the pictures.
    """
    if source.file is not None:
        noted = _noted(source.file, UNET_CONFIG)
        if noted is not None:
            return noted
        shapes = read_header(source.file).shapes
        told = next((shape for key, shape in shapes.items() if key.endswith(TOLD)), (None,))
        guided = shapes.get(UNET + GUIDED, (None,))
        reads = shapes.get(UNET + FIRST, (None, None))
        return {
            "cross_attention_dim": told[-1],
            "time_cond_proj_dim": guided[-1],
            "in_channels": reads[1],
        }
    folder = _described(source)
    file = folder / UNET_CONFIG if folder is not None else None
    return read_json(file) if file is not None and file.is_file() else None


def scheduler_config(source: Source) -> dict[str, Any]:
    """What the model's scheduler says of itself, as far as that is here: of a hub model before its
    first download, and of a single file that others wrote, nothing."""
    if source.file is not None:
        return _noted(source.file, SCHEDULER_CONFIG) or {}
    folder = source.folder or cached(source.name)
    file = folder / SCHEDULER_CONFIG if folder is not None else None
    return read_json(file) if file is not None and file.is_file() else {}


def is_xl(source: Source) -> bool:
    """Whether the model is SDXL or its refiner, told as `load` tells it."""
    if source.file is not None:
        return family_of(source.file, read_header(source.file).shapes).is_xl
    folder = _described(source)
    return folder is not None and folders.is_xl(folders.index(folder))


def _noted(file: Path, name: str) -> dict[str, Any] | None:
    """The config `name` that a single file of ours carries; None in those of others."""
    own = note.read_note(file, read_header(file).texts)
    return None if own is None else own.config(name)


def _described(source: Source) -> Path | None:
    """The folder with what a model in Diffusers layout says of itself: index, UNet config.

    Of a hub model these two are fetched where they are not in the cache, so that a model is the
    same before its first download as after. None for a single file.
    """
    if source.file is not None or source.folder is not None:
        return source.folder
    here = cached(source.name)
    if offline() or (here is not None and (here / UNET_CONFIG).is_file()):
        return here
    fetched_index(source.name)
    return fetched(source.name, UNET_CONFIG).parent.parent


def open_pipeline(
    source: Source, device: str, dtype: str, decoder: Path | None = None
) -> LatentDiffusionPipeline:
    """The loaded pipeline on `device`, in `dtype` (names as torch has them), with the small
    autoencoder in the folder `decoder` if there is one.

    Raises `UserError` in one line where the model cannot be loaded, as when the hub cannot be
    reached or a file is missing.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    import ldm_pipeline

    # Their bars for parts of a second; the hub's bar for a download stays.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # That torchvision is missing concerns nobody here: the pipeline makes its tensors itself.
    transformers.utils.logging.set_verbosity_error()
    place = source.folder or source.file or source.name
    try:
        pipeline = ldm_pipeline.load(place, torch_dtype=getattr(torch, dtype), decoder=decoder)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load {source.name}: {reason}") from error
    return pipeline.to(device)
