"""Opening and saving model folders: safetensors only, no code from a folder, stock's class name.

A folder in Diffusers layout has `model_index.json` and one folder per component. What is saved
carries the class name of the stock pipeline, because diffusers looks that name up in itself; what
is opened is opened whatever the name says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import OfflineModeIsEnabled
from packaging import version

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.models import bundled, folders

FROM_FOLDER: Any = object()
"""Stands for "load this component from the folder", since None means "leave it out"."""


class FolderPipeline(DiffusionPipeline):
    """A pipeline that is loaded from, and saved to, folders that stock diffusers reads."""

    _saved_class_name = "StableDiffusionPipeline"

    @classmethod
    def bundled(cls) -> Self:
        """The model that comes with the package, in float32; `UserError` where it is missing."""
        return cls.from_pretrained(bundled.folder())

    @classmethod
    def from_pretrained(  # stock takes any keyword; here a typo is refused
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        device_map: str | None = None,
        vae: Any = FROM_FOLDER,
        text_encoder: Any = FROM_FOLDER,
        tokenizer: Any = FROM_FOLDER,
        unet: Any = FROM_FOLDER,
        scheduler: Any = FROM_FOLDER,
        safety_checker: Any = FROM_FOLDER,
        feature_extractor: Any = FROM_FOLDER,
        image_encoder: Any = FROM_FOLDER,
        requires_safety_checker: bool = False,
        use_safetensors: bool = True,
    ) -> Self:
        """The pipeline in a Diffusers folder, ours or stock, or of a hub id.

        `dtype` (`torch_dtype` is its older name) is float32 unless given, whatever the files
        hold. Components that are passed are used instead of the folder's; None leaves one out. A
        folder whose weights all come in one variant ("fp16") needs no `variant`. Raises
        `UserError` for a missing or incomplete folder, for a model of another shape, for one
        that holds only pickled weights, and for one that wants to run its own code.
        """
        if not use_safetensors:
            raise UserError("use_safetensors=False is refused: a pickle can run any program")
        if dtype is not None and torch_dtype is not None:
            raise UserError("dtype and torch_dtype were both passed; pass only dtype")
        given = {
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
        }
        given = {name: part for name, part in given.items() if part is not FROM_FOLDER}
        source = pretrained_model_name_or_path
        try:
            folder = Path(source).expanduser()
            if not folder.is_dir():
                hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
                hub |= {"local_files_only": local_files_only, "variant": variant}
                folder = _fetched(cls, str(source), **hub, **given)
            folders.check(folder, cls._get_signature_types(), given)
            pipeline: Self = super().from_pretrained(
                str(folder),
                **dtype_argument(dtype or torch_dtype or torch.float32),
                variant=variant or folders.only_variant(folder),
                device_map=device_map,
                use_safetensors=True,
                requires_safety_checker=requires_safety_checker,
                **given,
            )
        except UserError:
            raise
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{source} cannot be loaded: {reason}") from error
        pipeline.register_to_config(_name_or_path=str(source))
        return pipeline

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> Self:
        """A pipeline over the parts of another one, ours or stock: no weight is copied.

        `components` take the place of the other's parts. Unless a `dtype` is given the weights
        keep theirs: they are the other pipeline's too. (Stock makes them float32.) Raises
        `UserError` for a component that no such pipeline has.
        """
        known, _ = cls._get_signature_keys(cls)
        for name in components:
            choose("component", name, known)
        parts = {name: part for name, part in pipeline.components.items() if name in known}
        made = cls(**{**dict.fromkeys(known), **parts, **components})
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        wanted = dtype or torch_dtype
        return made if wanted is None else made.to(wanted)

    def _stock_class_name(self) -> str:
        """The stock class that draws with the parts at hand."""
        return self._saved_class_name

    def to_json_string(self) -> str:
        """The contents of `model_index.json`, under the class name that stock diffusers knows."""
        contents = json.loads(super().to_json_string())
        contents["_class_name"] = self._stock_class_name()
        return json.dumps(contents, indent=2, sort_keys=True) + "\n"


def _fetched(cls: type[FolderPipeline], hub_id: str, **told: Any) -> Path:
    """The folder of a hub model, downloaded or in the cache; `UserError` where there is no way."""
    loudness = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # what it warns of is in our one line
    try:
        return Path(cls.download(hub_id, use_safetensors=True, **told))
    except (OSError, ValueError) as error:
        root = error.__cause__ or error
        offline = told["local_files_only"] or isinstance(root, OfflineModeIsEnabled)
        why = "offline, and not in the cache" if offline else str(root).strip().partition("\n")[0]
        raise UserError(
            f"there is no model folder {hub_id}, and as a hub id it could not be fetched ({why}); "
            "name a folder in Diffusers layout, or a model of the hub as owner/name"
        ) from error
    finally:
        diffusers_logging.set_verbosity(loudness)


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`dtype` under the name that the installed diffusers takes without a deprecation warning."""
    renamed = version.parse(diffusers_version) >= version.parse("0.42")
    return {"dtype" if renamed else "torch_dtype": dtype}
