"""Opening and saving model folders: safetensors only, no code from a folder, stock's class name.

A folder in Diffusers layout has `model_index.json` and one folder per component. What is saved
carries the class name of the stock pipeline, because diffusers looks that name up in itself; what
is opened is opened whatever the name says.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version
from packaging import version

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.models import bundled, folders
from ldm_pipeline.models.config_values import check_values
from ldm_pipeline.models.hub import fetched_file, fetched_index, reaching
from ldm_pipeline.models.original.checkpoint import SingleFile, open_single_file
from ldm_pipeline.models.quantising import quantised
from ldm_pipeline.models.quiet import quiet_diffusers
from ldm_pipeline.models.reading import reading
from ldm_pipeline.models.schedulers import scheduler_class
from ldm_pipeline.models.trust import check_component, check_links, components, read_json
from ldm_pipeline.stock_arguments import (
    FROM_FOLDER,
    OF_A_DOWNLOAD,
    SETTINGS,
    check_no_code,
    check_other_loaders,
    check_safe,
    heard,
    of_a_file,
)
from ldm_pipeline.values import DTYPES, check_path, shown

logger = logging.getLogger(__name__)

Dtypes = torch.dtype | str | Mapping[str, torch.dtype | str]
"""A dtype, torch's or its name, or one for each component and "default" for the rest."""

WEIGHED = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "safety_checker")
"""The components that have weights, and so a dtype."""


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
        dtype: Dtypes | None = None,
        torch_dtype: Dtypes | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        offload_state_dict: bool | None = None,
        low_cpu_mem_usage: bool = True,
        vae: Any = FROM_FOLDER,
        text_encoder: Any = FROM_FOLDER,
        text_encoder_2: Any = FROM_FOLDER,
        tokenizer: Any = FROM_FOLDER,
        tokenizer_2: Any = FROM_FOLDER,
        unet: Any = FROM_FOLDER,
        scheduler: Any = FROM_FOLDER,
        safety_checker: Any = FROM_FOLDER,
        feature_extractor: Any = FROM_FOLDER,
        image_encoder: Any = FROM_FOLDER,
        requires_safety_checker: bool = FROM_FOLDER,
        add_watermarker: bool | None = FROM_FOLDER,
        force_zeros_for_empty_prompt: bool = FROM_FOLDER,
        requires_aesthetics_score: bool = FROM_FOLDER,
        use_safetensors: bool | None = True,
        custom_pipeline: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        disable_mmap: bool = False,
        **of_others: Any,
    ) -> Self:
        """The pipeline in a Diffusers folder, ours or stock, or of a hub id.

        `dtype` (`torch_dtype` is its older name), torch's or its name, is float32 unless given,
        whatever the files hold; a dictionary says it by component. Components that are passed are
        used instead of the folder's; None leaves one out. A folder whose weights are plain or else
        of one variant ("fp16") needs no `variant`. The other arguments are stock's; a setting that
        only other pipelines have does nothing. Raises `UserError` for a missing or incomplete
        folder, for a model of another shape, for one that holds only pickled weights, and for one
        that wants to run its own code.
        """
        check_other_loaders(cls.__name__, of_others)
        check_safe(use_safetensors)
        check_no_code(custom_pipeline, trust_remote_code)
        dtype = dtypes(dtype, torch_dtype)
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        given = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
        }
        settings = {
            "requires_safety_checker": requires_safety_checker,
            "add_watermarker": add_watermarker,
            "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
            "requires_aesthetics_score": requires_aesthetics_score,
        }
        own = cls._get_signature_types()
        given = heard(cls.__name__, own, given)
        settings = heard(cls.__name__, own, settings)
        source = pretrained_model_name_or_path
        with reading(f"{source} cannot be loaded"):
            folder = Path(source).expanduser()
            if not folder.is_dir():
                hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
                hub |= {"local_files_only": local_files_only, "force_download": force_download}
                fetched_index(str(source), **hub)
                folder = _fetched(cls, str(source), variant=variant, **hub, **given)
            folders.check(folder, own, given)
            cls._check_parts(folder, given)
            scheduler = components(folders.index(folder)).get("scheduler")
            if scheduler is not None and "scheduler" not in given:
                scheduler_class(scheduler[1], folder)
            pipeline: Self = super().from_pretrained(
                str(folder),
                **dtype_argument(dtype),
                variant=variant or folders.only_variant(folder),
                device_map=device_map,
                max_memory=max_memory,
                offload_folder=offload_folder,
                offload_state_dict=offload_state_dict,
                low_cpu_mem_usage=low_cpu_mem_usage,
                disable_mmap=disable_mmap,
                use_safetensors=True,
                **settings,
                **given,
            )
        if device_map is None:  # else what lies elsewhere has no memory, either
            folders.check_filled(folder, pipeline.components, given)
        pipeline.register_to_config(_name_or_path=str(source))
        return pipeline

    @classmethod
    def _check_parts(cls, folder: Path, given: Collection[str]) -> None:
        """Raise `UserError` where a part is neither in the folder nor given, without which no such
        pipeline is opened."""
        needed = set(cls._get_signature_keys(cls)[0]) - set(cls._optional_components)
        for name in sorted(needed - components(folders.index(folder)).keys() - set(given)):
            raise UserError(
                f"{folder} names no {name}; take the whole model, or pass {name}=… to"
                f" {cls.__name__}.from_pretrained"
            )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        dtype: Dtypes | None = None,
        torch_dtype: Dtypes | None = None,
        prediction_type: str | None = None,
        tokenizer_folder: str | os.PathLike[str] | None = None,
        **parts: Any,
    ) -> Self:
        """The pipeline in one `.safetensors` file in the original layout, without any network but
        for a file of the hub, which is named by its link.

        `parts` are used instead of the file's, by their components' names. `tokenizer_folder` has
        CLIP's vocabulary, where neither the file nor this machine has it; so may a folder named by
        `config`, whose scheduler is then taken, as stock does. What else stock takes is let pass
        (see `stock_arguments.py`). Raises `UserError` for files of another kind or family,
        and where a part is missing.
        """
        hub = {name: parts[name] for name in OF_A_DOWNLOAD if name in parts}
        config = parts.get("config")
        if isinstance(config, str | os.PathLike) and Path(config).expanduser().is_dir():
            told = Path(parts.pop("config")).expanduser()
            if "scheduler" not in parts:
                parts |= _scheduler_in(told)
            if tokenizer_folder is None and any(told.glob("tokenizer*")):
                tokenizer_folder = told
        parts = of_a_file(cls.__name__, parts)
        parts = heard(cls.__name__, cls._get_signature_types(), parts)
        check_path("pretrained_model_link_or_path", pretrained_model_link_or_path)
        file = Path(pretrained_model_link_or_path).expanduser()
        if not file.is_file():
            file = fetched_file(str(pretrained_model_link_or_path), **hub)
        checkpoint = single_file(
            file, prediction_type=prediction_type, tokenizer=tokenizer_folder, given=parts
        )
        return cls.from_checkpoint(checkpoint, dtypes(dtype, torch_dtype), parts)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: SingleFile,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        parts: Mapping[str, Any] | None = None,
    ) -> Self:
        """The pipeline of an opened single file, in `dtype`, which may say it by component; `parts`
        are not taken from it."""
        from ldm_pipeline.models.original import build

        given = dict(parts or {})
        if checkpoint.family.is_xl != ("text_encoder_2" in cls._get_signature_types()):
            raise UserError(
                f"{checkpoint.file} holds {checkpoint.family.name}, which {cls.__name__} cannot"
                " draw with; ldm_pipeline.load picks the pipeline that can"
            )
        told = json.loads(checkpoint.files[folders.INDEX])
        settings = {
            name: told[name]
            for name in SETTINGS
            if name in told and name in cls._get_signature_types()
        }
        absent = dict.fromkeys(cls._get_signature_keys(cls)[0])
        found = build.components(checkpoint, dtype, given)
        with reading(f"{checkpoint.file} cannot be loaded"):
            pipeline = cls(**{**absent, **found, **settings, **given})
        pipeline.register_to_config(_name_or_path=str(checkpoint.file))
        return pipeline

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **components: Any,
    ) -> Self:
        """A pipeline over the parts of another one, ours or stock: no weight is copied.

        `components` take the place of the other's parts, and settings that both kinds have stay.
        Unless a `dtype` is given the weights keep theirs: they are the other pipeline's too. (Stock
        makes them float32.) Raises `UserError` for a component that no such pipeline has.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise UserError(
                f"pipeline={shown(pipeline)} must be a pipeline that is loaded; load opens a folder"
            )
        known, optional = cls._get_signature_keys(cls)
        for name in components:
            choose("component", name, known)
        parts = {name: part for name, part in pipeline.components.items() if name in known}
        settings = {name: pipeline.config[name] for name in optional if name in pipeline.config}
        made = cls(**{**settings, **dict.fromkeys(known), **parts, **components})
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return made if not (dtype or torch_dtype) else made.to(one_dtype(dtype, torch_dtype))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *told: Any, **named: Any
    ) -> None:
        """Stock's, with its arguments. Raises `UserError` where weights were rounded: folders hold
        whole ones, of which rounded ones are soon made."""
        unet = self.components.get("unet")
        check_path("save_directory", save_directory)
        if Path(save_directory).is_file():
            raise UserError(
                f"save_directory={shown(save_directory)} must be a folder, or a new one"
            )
        if unet is not None and (kind := quantised(unet)) != "none":
            raise UserError(f"the UNet's weights were rounded to {kind}, and are not saved so")
        super().save_pretrained(save_directory, *told, **named)

    def _stock_class_name(self) -> str:
        """The stock class that draws with the parts at hand."""
        return self._saved_class_name

    def to_json_string(self) -> str:
        """The contents of `model_index.json`, under the class name that stock diffusers knows."""
        contents = json.loads(super().to_json_string())
        contents["_class_name"] = self._stock_class_name()
        return json.dumps(contents, indent=2, sort_keys=True) + "\n"


def dtypes(
    dtype: Dtypes | None, torch_dtype: Dtypes | None
) -> torch.dtype | dict[str, torch.dtype]:
    """The same as `one_dtype`, or what a dictionary says by component."""
    wanted = torch_dtype if dtype is None else dtype
    if isinstance(wanted, Mapping) and (dtype is None or torch_dtype is None):
        for name in wanted:
            choose("component of dtype", name, (*WEIGHED, "default"))
        return {name: one_dtype(each, None) for name, each in wanted.items()}
    return one_dtype(dtype, torch_dtype)


def one_dtype(dtype: Dtypes | None, torch_dtype: Dtypes | None) -> torch.dtype:
    """The dtype that was asked for under its name or its older one; float32 where none was.

    Raises `UserError` for both at once, and for what is no dtype of floats and names none of
    `DTYPES`.
    """
    if dtype is not None and torch_dtype is not None:
        raise UserError("dtype and torch_dtype were both passed; pass only dtype")
    name, wanted = ("dtype", dtype) if torch_dtype is None else ("torch_dtype", torch_dtype)
    if wanted is None:
        wanted = torch.float32
    if wanted == "auto":
        logger.warning("%s='auto' is float32, as in stock pipelines", name)
        wanted = torch.float32
    if isinstance(wanted, str):
        wanted = getattr(torch, choose(name, wanted, DTYPES))
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise UserError(f"{name}={wanted!r} must be one of {', '.join(DTYPES)}, or torch's")
    return wanted


def single_file(
    file: Path,
    *,
    prediction_type: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    given: Collection[str] = (),
) -> SingleFile:
    """The checkpoint in a single file; see `open_single_file`."""
    folder = None if tokenizer is None else Path(tokenizer).expanduser()
    return open_single_file(file, prediction_type=prediction_type, tokenizer=folder, given=given)


def _fetched(cls: type[FolderPipeline], hub_id: str, **told: Any) -> Path:
    """The folder of a hub model, downloaded or in the cache; `UserError` where there is no way."""
    with quiet_diffusers(), reaching(hub_id, told["local_files_only"]):
        return Path(cls.download(hub_id, use_safetensors=True, **told))


def _scheduler_in(folder: Path) -> dict[str, Any]:
    """The scheduler of a model's folder, under its name; nothing where the folder has none."""
    place = folder / "scheduler"
    if not place.is_dir():
        return {}
    with reading(f"{place} cannot be loaded"):
        check_links(place, folder)
        check_component(place)
        file = place / "scheduler_config.json"
        told = read_json(file)
        check_values(file, "scheduler", told)
        return {"scheduler": scheduler_class(told.get("_class_name"), file).from_config(told)}


def dtype_argument(dtype: torch.dtype | dict[str, torch.dtype]) -> dict[str, Any]:
    """`dtype` under the name that the installed diffusers takes without a deprecation warning."""
    renamed = version.parse(diffusers_version) >= version.parse("0.42")
    return {"dtype" if renamed else "torch_dtype": dtype}
