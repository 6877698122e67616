"""A single file as the folder that it could be: its family, small files, and named tensors.

Nothing is read but the header: tensors stay where they are (`tensors.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError, choose
from ldm_pipeline.models.config_values import check_values
from ldm_pipeline.models.folders import check_numbers
from ldm_pipeline.models.headers import read_header
from ldm_pipeline.models.original import configs, note, tokenizers
from ldm_pipeline.models.original.clip import with_body
from ldm_pipeline.models.original.families import FIRST, PAINTING_CHANNELS, UNET, Family, family_of
from ldm_pipeline.models.original.names import Tensors
from ldm_pipeline.models.original.tensors import Stored, stored
from ldm_pipeline.models.reading import reading
from ldm_pipeline.models.trust import check_classes

logger = logging.getLogger(__name__)

PREDICTIONS = ("epsilon", "v_prediction")
MARKS = ("v_pred", "ztsnr")
"""Tensors by which fine-tuned models say that they predict v, and to which noise they reach."""


@dataclass(frozen=True)
class SingleFile:
    """What a single file holds.

    files   the small files of a Diffusers folder, by their names in it
    parts   for each component with weights its tensors, under Diffusers' names
    bare    the text encoders whose tensors a folder keeps without `text_model`
    rest    tensors that Diffusers has no place for, under their own names
    """

    file: Path
    family: Family
    files: Mapping[str, str]
    parts: Mapping[str, Tensors]
    bare: tuple[str, ...]
    rest: Tensors

    def config(self, component: str) -> dict[str, Any]:
        """The config of a component."""
        name = "scheduler_config" if component == "scheduler" else "config"
        contents = json.loads(self.files[f"{component}/{name}.json"])
        assert isinstance(contents, dict)
        return contents


def check_name(file: Path) -> None:
    """Raise `UserError` for a file that is not even called a safetensors file."""
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is a file, but no .safetensors; other kinds can run any program when opened:"
            " convert it to safetensors first, or take the model's .safetensors"
        )


def open_single_file(
    file: Path,
    *,
    prediction_type: str | None = None,
    tokenizer: Path | None = None,
    given: Collection[str] = (),
) -> SingleFile:
    """The checkpoint in `file`.

    What it predicts is told by the file, else by the family, unless `prediction_type` says it.
    `tokenizer` is a folder with CLIP's vocabulary; components in `given` are brought by the caller
    and not looked for. Raises `UserError` for files of other kinds and for parts that are missing.
    """
    if prediction_type is not None:
        choose("prediction_type", prediction_type, PREDICTIONS)
    check_name(file)
    texts = read_header(file).texts
    tensors = _with_body(stored(file))
    family = family_of(file, tensors)
    own = note.read_note(file, texts)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    if own is None:
        prediction = prediction_type or _prediction(file, family, shapes, texts)
        files = _files(file, family, shapes, prediction, given)
        for part in family.texts:
            if part.tokenizer not in given:
                config = files.get(f"{part.component}/config.json")
                if config is None:
                    raise UserError(
                        f"{file} does not tell which tokenizer goes with the {part.component} that"
                        f" was passed; pass {part.tokenizer}=…, too"
                    )
                words = json.loads(config)["vocab_size"]
                found = tokenizers.vocabulary(file, words, tokenizer)
                pad = "!" if part.open_clip else tokenizers.END
                found["tokenizer_config.json"] = tokenizers.settings(pad)
                files |= {f"{part.tokenizer}/{name}": text for name, text in found.items()}
    else:
        files = dict(own.files)
        if prediction_type is not None:
            name = "scheduler/scheduler_config.json"
            told = json.loads(files[name])
            files[name] = _text(told | {"prediction_type": prediction_type})
    _check_files(file, family, files, given)
    parts, rest = _parts(file, family, files, tensors, given)
    return SingleFile(file, family, files, parts, own.bare if own else (), rest)


def _with_body(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors with CLIP's under `text_model`, which a few files leave out."""
    mark = "cond_stage_model.transformer."
    return {
        mark + with_body(key.removeprefix(mark)) if key.startswith(mark) else key: tensor
        for key, tensor in tensors.items()
    }


def _prediction(
    file: Path, family: Family, shapes: configs.Shapes, texts: Mapping[str, str]
) -> str:
    """What the UNet predicts: by the file's own word, a mark among its tensors, or the family.

    Of SD 2.x the models for drawing at 768 pixels predict v; the one for inpainting, of 512, noise.
    """
    told = str(texts.get("modelspec.prediction_type", ""))
    if told in ("v", "v_prediction") or MARKS[0] in shapes:
        return "v_prediction"
    if told == "epsilon" or _paints(shapes):
        return "epsilon"
    if family.prediction == "v_prediction":
        logger.warning(
            "%s does not say what its UNet predicts; it is taken for v, as in the 768 pixel model."
            " For the 512 pixel model (2-base) say so: load(…, prediction_type='epsilon'), or ldm"
            " convert --prediction-type epsilon",
            file,
        )
    return family.prediction


def _files(
    file: Path,
    family: Family,
    shapes: configs.Shapes,
    prediction: str,
    given: Collection[str],
) -> dict[str, str]:
    """The small files of the folder, all but the tokenizers', from the shapes."""
    found: dict[str, Any] = {"model_index.json": _index(family, _paints(shapes))}
    makers: dict[str, Any] = {
        "unet": lambda own: configs.unet_config(own, family, prediction),
        "vae": lambda own: configs.vae_config(own, family, prediction),
    }
    for part in family.texts:
        makers[part.component] = lambda own, part=part: configs.text_config(own, part)
    for component, make in makers.items():
        prefix = family.prefix(component)
        own = {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}
        whole = f"take a file of the whole model, or give from_single_file {component}=…"
        if not own and component not in given:
            raise UserError(f"{file} holds no {component}; {whole}")
        try:
            found[f"{component}/config.json"] = make(own)
        except (KeyError, ValueError, IndexError) as error:
            if component in given:
                continue
            raise UserError(
                f"{file} holds no whole {component} ({error} is missing); {whole}"
            ) from None
    zero = MARKS[1] in shapes
    found["scheduler/scheduler_config.json"] = configs.scheduler_config(family, prediction, zero)
    return {name: _text(contents) for name, contents in found.items()}


def _paints(shapes: configs.Shapes) -> bool:
    """Whether the UNet reads a mask and what stays of a picture beside the latents."""
    return shapes[UNET + FIRST][1:2] == (PAINTING_CHANNELS,)


def _index(family: Family, paints: bool) -> dict[str, Any]:
    """The contents of `model_index.json`."""
    name = family.pipeline
    if paints:
        name = name.replace("Pipeline", "InpaintPipeline")
    scheduler = configs.scheduler_config(family, family.prediction)["_class_name"]
    contents: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": version("diffusers"),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
    }
    for part in family.texts:
        kind = "CLIPTextModelWithProjection" if part.projects else "CLIPTextModel"
        contents[part.component] = ["transformers", kind]
        contents[part.tokenizer] = ["transformers", "CLIPTokenizer"]
    empty = ["feature_extractor", "image_encoder"]
    if not family.is_xl:
        empty.append("safety_checker")
        contents["requires_safety_checker"] = False
    elif len(family.texts) == 1:
        empty += ["text_encoder", "tokenizer"]
        contents |= {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    else:
        contents["force_zeros_for_empty_prompt"] = True
    return contents | {each: [None, None] for each in empty}


def _check_files(
    file: Path, family: Family, files: Mapping[str, str], given: Collection[str]
) -> None:
    """Refuse a note that lacks a file, names foreign classes, or holds no JSON where it must."""
    needed = [f"{name}/config.json" for name in family.components if name not in given]
    for name in ["model_index.json", "scheduler/scheduler_config.json", *needed]:
        try:
            contents = json.loads(files[name])
            if not isinstance(contents, dict):
                raise ValueError("no JSON object")
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{file} carries no usable {name}: {error!r}") from None
        check_classes(
            file, contents if name == "model_index.json" else {**contents, "_class_name": ""}
        )
        check_values(f"{name} in {file}", name.partition("/")[0], contents)


def _parts(
    file: Path,
    family: Family,
    files: Mapping[str, str],
    tensors: Tensors,
    given: Collection[str],
) -> tuple[dict[str, Tensors], dict[str, Stored]]:
    """The tensors of each component under Diffusers' names, and those of none."""
    parts: dict[str, Tensors] = {}
    rest = dict(tensors)
    shapes = [tensor.shape for tensor in tensors.values()]
    for component in family.components:
        if component in given:
            continue
        prefix = family.prefix(component)
        name = f"{component}/config.json"
        config = json.loads(files[name])
        check_numbers(f"{name} in {file}", config, shapes)
        with reading(f"{file}: no {component} can have this config"):
            layout = family.layout(component, config)
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        found = layout.to_diffusers(own)
        if component == "text_encoder":
            found.pop("text_projection.weight", None)  # it reads hidden states alone
        if not found:
            raise UserError(f"{file} holds no {component}; give from_single_file {component}=…")
        for key in layout.to_original(found):  # what has a name there and here
            del rest[prefix + key]
        parts[component] = found
    return parts, rest


def _text(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, indent=2, sort_keys=True) + "\n"
