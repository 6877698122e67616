"""Every setting of every training does something: change it, and something else happens.

The settings are found by walking the configurations; each needs an entry here, which says where its
change is seen: in the samples, the batch, the loss, the weights, the files written, or an error.
A setting that nobody reads would leave all of them as they were.

Legend
    key      a setting's dotted name, as on the command line; `*` is any key of a dictionary
    look     from a configuration to something that can be compared
    given    what else must be set for a setting to matter
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.data import rows
from ldm_pipeline.data.world import KINDS, Description, Scene
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora import files
from ldm_pipeline.training import clip, world_pictures
from ldm_pipeline.training.autoencoder import AutoencoderConfig, AutoencoderObjective
from ldm_pipeline.training.captioned import Captioned
from ldm_pipeline.training.clip import ClipConfig, ClipObjective
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.latent_diffusion import LatentDiffusionConfig, LatentDiffusionObjective
from ldm_pipeline.training.lcm import LcmConfig, LcmObjective
from ldm_pipeline.training.lcm_full import distillation
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.small_decoder import SmallDecoderConfig, SmallDecoderObjective
from tests.conftest import build, tiny_scheduler
from tests.training.conftest import SmallWorld
from tests.training.toy import Toy

Values = dict[str, Any]


class Look(Protocol):
    """A function from a configuration to something that can be compared."""

    __name__: str

    def __call__(self, config: Any, /) -> Any:
        """What is seen."""


@dataclass(frozen=True)
class Change:
    """Where a setting's other value is seen; both values are set beside `given`.

    `refuses` where one of the values is refused, which is then the difference; `needs` a package.
    """

    look: Look
    to: Any
    given: Values = field(default_factory=dict)
    refuses: bool = False
    needs: str | None = None


# -- what can be looked at -------------------------------------------------------------------


def digest(value: Any) -> str:
    """A hash of tensors, arrays and whatever holds them."""
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Mapping):
        value = {name: digest(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        value = [digest(inner) for inner in value]
    return repr(value)


def open_model(source: str, dtype: torch.dtype) -> LatentDiffusionPipeline:
    """Tiny components; the model "v" predicts v, the only other one noise."""
    kind = {"prediction_type": "v_prediction"} if source == "v" else {}
    return LatentDiffusionPipeline(**build(scheduler=tiny_scheduler(**kind))).to(dtype)


def lora(config: LoraConfig) -> LoraObjective:
    """The objective over tiny components."""
    return LoraObjective(config, open_model)


def lcm(config: LcmConfig) -> LcmObjective:
    """The objective over tiny components."""
    return distillation(config, open_model)


OBJECTIVES: dict[type[TrainingConfig], Callable[[Any], Any]] = {
    LoraConfig: lora,
    LcmConfig: lcm,
    AutoencoderConfig: AutoencoderObjective,
    SmallDecoderConfig: SmallDecoderObjective,
    ClipConfig: ClipObjective,
    LatentDiffusionConfig: LatentDiffusionObjective,
}


def objective(config: TrainingConfig) -> Any:
    """What a configuration trains."""
    return OBJECTIVES[type(config)](config)


def batch(config: TrainingConfig) -> str:
    """The first eight samples."""
    return digest(objective(config).batch(range(8)))


def loss(config: TrainingConfig) -> dict[str, float]:
    """What is measured on the first samples: all of the regularisation's order is among them."""
    built = objective(config)
    with torch.no_grad():
        return {name: float(value) for name, value in built(built.batch(range(8))).items()}


def trained(config: TrainingConfig) -> str:
    """What is trained, and its first values."""
    built = objective(config)
    return digest({n: p for n, p in built.named_parameters() if p.requires_grad})


def gradients(config: TrainingConfig) -> str:
    """The gradients of the first samples."""
    built = objective(config)
    built(built.batch(range(4)))["loss"].backward()
    return digest({n: p.grad for n, p in built.named_parameters() if p.grad is not None})


def samples(config: Any) -> list[Any]:
    """The samples of a data set with how they are cut, those to train on and those held out."""
    data = Captioned(config.data, config.run.seed, config.run.batch_size)
    return [[(s.item, s.transform, s.key) for s in part] for part in (data.samples, data.held_out)]


def words(config: Any) -> list[str]:
    """Every text that a step may ask for."""
    return Captioned(config.data, config.run.seed, config.run.batch_size).texts()


def recomputed(config: TrainingConfig) -> int:
    """How often a block behind adapted ones is gone through in a step, forward and backward."""
    built, count = objective(config), []
    nn.Module.train(built)
    # Before it: what is computed again stops as soon as the backward has what it needs.
    built.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: count.append(1))
    built(built.batch(range(1)))["loss"].backward()
    return len(count)


def picture(config: TrainingConfig) -> str:
    """What a validation shows."""
    shown = objective(config).picture()
    return digest(None if shown is None else np.asarray(shown))


def validation(config: TrainingConfig) -> dict[str, float]:
    """What a validation measures."""
    return dict(objective(config).validate())


def learnt(config: TrainingConfig) -> str:
    """What is trained, after two updates."""
    shutil.rmtree(config.run.out, ignore_errors=True)
    built = objective(config)
    fit(built, config)
    return digest({n: p for n, p in built.named_parameters() if p.requires_grad})


def exported(config: TrainingConfig) -> list[str]:
    """What a finished run leaves."""
    folder = Path("exported")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    objective(config).export(folder, 0)
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def cached(config: TrainingConfig) -> list[str]:
    """In which folders something is kept."""
    for name in ("cache", "elsewhere"):
        shutil.rmtree(name, ignore_errors=True)
    objective(config)
    return [name for name in ("cache", "elsewhere") if Path(name).exists()]


class Told(SmallWorld):
    """A small world that thinks of each sample once: a tokenizer asks 20,000 times."""

    def told(self, index: int) -> tuple[Scene, Description, str]:
        """What the small world tells."""
        return _told(self.seed, self.split, index % 400)


@cache
def _told(seed: int, split: str, index: int) -> tuple[Scene, Description, str]:
    return SmallWorld(seed, split).told(index)


class Watched(Toy):
    """A toy that says which process made a batch."""

    def batch(self, positions: range) -> dict[str, Any]:
        """The toy's batch and the process."""
        return {**super().batch(positions), "process": torch.tensor(os.getpid())}


def run(seen: str) -> Look:
    """A whole run of a toy, of which one thing is `seen`."""

    def look(config: TrainingConfig) -> Any:
        for name in ("toy", "elsewhere"):
            shutil.rmtree(name, ignore_errors=True)
        asked: list[tuple[int, int]] = []
        logged: list[tuple[int, str]] = []
        found: dict[str, Any] = {"asked": asked, "logged": logged, "compiled": 0, "own": 0}

        def forward(module: nn.Module, told: tuple[Any, ...]) -> None:
            if "process" in told[0]:
                found["own"] += int(told[0]["process"] == os.getpid())

        def compiled(module: nn.Module, **how: Any) -> nn.Module:
            found["compiled"] += 1
            return module

        def log(self: Accelerator, values: Values, step: int) -> None:
            logged.append((step, min(values)))

        toy = Watched(config, lambda positions: asked.append((positions.start, positions.stop)))
        toy.register_forward_pre_hook(forward)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compiled)
            patch.setattr(Accelerator, "log", log)
            final = fit(toy, config)
        found["weights"] = digest((final / "toy.safetensors").read_bytes())
        found["final"] = str(final)
        found["written"] = sorted(path.name for path in config.run.out.iterdir())
        found["kept"] = sorted(path.name for path in (config.run.out / "checkpoints").iterdir())
        return found[seen]

    look.__name__ = f"run: {seen}"
    return look


LOOKS = {seen: run(seen) for seen in (
    "asked", "logged", "compiled", "own", "weights", "final", "written", "kept")}  # fmt: skip

# -- the settings ----------------------------------------------------------------------------

BASE: dict[type[TrainingConfig], Values] = {
    TrainingConfig: {
        "run": {"out": "toy", "steps": 4, "batch_size": 4, "mixed_precision": "no", "workers": 0,
                "log_every": 1, "validate_every": 2, "save_every": 2, "keep_checkpoints": 9,
                "log_with": "none"},
        "optimiser": {"lr": 0.01, "warmup_steps": 0, "ema_decay": 0.0},
    },
    LoraConfig: {
        "run": {"out": "unused", "batch_size": 4, "mixed_precision": "no"},
        "data": {"source": "pictures", "resolution": 64, "bucket_step": 32},
        "lora": {"rank": 2},
    },
    LcmConfig: {
        "run": {"out": "distilled", "steps": 2, "batch_size": 4, "mixed_precision": "no",
                "workers": 0, "log_with": "none"},
        "data": {"source": "pictures", "resolution": 64, "bucket_step": 32},
        "lora": {"rank": 2},
    },
    AutoencoderConfig: {
        "run": {"out": "unused", "batch_size": 2},
        "model": {"channels": [8, 8, 8, 8], "norm_groups": 4},
        "crop": 32, "first_crop": 16,
    },
    SmallDecoderConfig: {
        "run": {"out": "unused", "batch_size": 2, "mixed_precision": "no"},
        "autoencoder": "autoencoder",
        "model": {"channels": 8, "blocks": [1, 1, 1, 1], "encoder_channels": 8},
        "data": {"pictures": 8}, "crop": 32,
    },
    ClipConfig: {
        "run": {"out": "unused", "batch_size": 2},
        "model": {"text_width": 16, "text_layers": 1, "vision_width": 16, "vision_layers": 1,
                  "heads": 2, "patch": 32, "projection": 16},
    },
    LatentDiffusionConfig: {
        "run": {"out": "unused", "batch_size": 2, "mixed_precision": "no"},
        "autoencoder": "autoencoder", "text": "text",
        "model": {"channels": [8, 16], "attends": [True, False], "norm_groups": 4, "heads": 2},
        "data": {"pictures": 8},
    },
}  # fmt: skip
"""A small configuration of each kind; whatever it does not say has its default."""

SHARED = {
    "run.out": Change(LOOKS["final"], "elsewhere"),
    "run.seed": Change(LOOKS["weights"], 1),
    "run.steps": Change(LOOKS["asked"], 5),
    "run.batch_size": Change(LOOKS["asked"], 8),
    "run.accumulation": Change(LOOKS["asked"], 2),
    "run.mixed_precision": Change(LOOKS["weights"], "bf16"),
    "run.compile": Change(LOOKS["compiled"], True),
    "run.workers": Change(LOOKS["own"], 1),
    "run.log_every": Change(LOOKS["logged"], 2),
    "run.validate_every": Change(LOOKS["logged"], 3),
    "run.save_every": Change(LOOKS["kept"], 3),
    "run.keep_checkpoints": Change(LOOKS["kept"], 1),
    "run.log_with": Change(LOOKS["written"], "tensorboard"),
    "optimiser.kind": Change(LOOKS["weights"], "adafactor"),
    "optimiser.lr": Change(LOOKS["weights"], 0.02),
    "optimiser.betas": Change(LOOKS["weights"], (0.5, 0.99)),
    "optimiser.weight_decay": Change(LOOKS["weights"], 0.5),
    "optimiser.eps": Change(LOOKS["weights"], 0.01),
    "optimiser.warmup_steps": Change(LOOKS["weights"], 4),
    "optimiser.cooldown_steps": Change(LOOKS["weights"], 4),
    "optimiser.max_grad_norm": Change(LOOKS["weights"], 0.01),
    "optimiser.ema_decay": Change(LOOKS["weights"], 0.9),
}
"""What the engine does with any objective, seen on a toy."""

SHUFFLED = {"data.captions.shuffle_tags": True}
RECORDS = {"data.source": "records"}
REGULARISED = {"data.regularisation": "others"}
SHOWN = {"pictures.prompts": ["red"], "pictures.steps": 1}
NOT_UNIFORM = {"levels.uniform": 0.0}
SEEDED = {"run.seed": 1}
"""What was trained before was begun with another seed, 0."""
PIXELS = {"pixels.weight": 0.5, "pixels.decoder": "small decoder"}

PICTURES = {
    "data.source": Change(samples, "others"),
    "data.split": Change(samples, "test", {"data.source": "table"}, needs="datasets"),
    "data.resolution": Change(samples, 32),
    "data.bucket_step": Change(samples, 64),
    "data.fixed": Change(samples, True),
    "data.upscale": Change(samples, True, {"data.resolution": 128}),
    "data.random_crop": Change(samples, True),
    "data.alpha_masks": Change(loss, True),
    "data.limit": Change(samples, 3),
    "data.strict": Change(samples, True, {"data.source": "one bad"}, refuses=True),
    "data.regularisation": Change(loss, "others"),
    "data.regularisation_weight": Change(loss, 0.5, REGULARISED),
    "data.stream": Change(samples, True, {"data.source": "table"}, needs="datasets"),
    "data.held_out": Change(samples, 0.5),
    "data.measured": Change(validation, 1, {"data.held_out": 0.5}),
    "data.cache": Change(cached, "elsewhere"),
    "data.captions.dropout": Change(batch, 1.0),
    "data.captions.shuffle_tags": Change(words, True),
    "data.captions.tag_dropout": Change(words, 0.5),
    "data.captions.keep_tags": Change(words, 2, SHUFFLED),
    "data.captions.variants": Change(words, 2, SHUFFLED),
    "data.captions.key": Change(words, "captions", RECORDS),
    "data.captions.default": Change(words, "blue", {"data.source": "others"}),
}  # fmt: skip
"""Of captioned pictures, whatever is trained on them."""

WORLD = {"data": None, "world.pictures": 3}

OWN: dict[type[TrainingConfig], dict[str, Change]] = {
    LoraConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "adapter"),
        "model": Change(loss, "v"),
        **PICTURES,
        "lora.targets": Change(trained, "all"),
        "lora.rank": Change(trained, 4),
        "lora.alpha": Change(gradients, 8.0),
        "lora.dora": Change(trained, True),
        "lora.rslora": Change(gradients, True),
        "lora.overrides.*.rank": Change(trained, 4),
        "lora.overrides.*.alpha": Change(gradients, 8.0),
        "lora.formats": Change(exported, ["kohya", "peft"]),
        "lora.text_encoder": Change(trained, True),
        "loss.weighting": Change(loss, "debiased"),
        "loss.gamma": Change(loss, 1.0, {"loss.weighting": "min_snr"}),
        "loss.huber": Change(loss, 0.1),
        "loss.offset_noise": Change(batch, 0.1),
        "loss.pyramid_noise": Change(batch, 0.5),
        "loss.zero_terminal_snr": Change(loss, True, {"model": "v"}),
        "loss.regularise_to": Change(loss, "answers", REGULARISED),
        "levels.mean": Change(batch, 1.0, NOT_UNIFORM),
        "levels.std": Change(batch, 2.0, NOT_UNIFORM),
        "levels.uniform": Change(batch, 0.0),
        "gradient_checkpointing": Change(recomputed, True),
        "pictures.prompts": Change(picture, ["red"], {"pictures.steps": 1}),
        "pictures.steps": Change(picture, 2, SHOWN),
        "pictures.guidance": Change(picture, 2.0, SHOWN),
        "pictures.negative": Change(picture, "blue", SHOWN),
    },
    LcmConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "adapter"),
        "model": Change(loss, "v"),
        **PICTURES,
        "world.seed": Change(batch, 1, WORLD),
        "world.pictures": Change(batch, 2, WORLD),
        "world.cache": Change(cached, "elsewhere", WORLD),
        "lora.targets": Change(trained, "all"),
        "lora.rank": Change(trained, 4),
        "lora.alpha": Change(gradients, 8.0),
        "lora.dora": Change(trained, True),
        "lora.rslora": Change(gradients, True),
        "lora.overrides.*.rank": Change(trained, 4),
        "lora.overrides.*.alpha": Change(gradients, 8.0),
        "lora.formats": Change(exported, ["kohya", "peft"]),
        "lcm.original_steps": Change(batch, 20),
        "lcm.spacing": Change(batch, "angle"),
        "lcm.stride": Change(batch, 2),
        "lcm.teacher_steps": Change(batch, 2),
        "lcm.towards_noise": Change(batch, 2.0),
        "lcm.own_pictures": Change(batch, 0.5),
        "lcm.timestep_scaling": Change(loss, 0.01),
        "lcm.w": Change(batch, (1.0, 2.0)),
        "lcm.solver": Change(loss, "heun"),
        "lcm.huber": Change(loss, 0.1),
        "lcm.units": Change(loss, "latents"),
        "lcm.full": Change(trained, True, {"lora": {}}),
        "lcm.w_channels": Change(trained, 32, {"lora": {}, "lcm.full": True}),
        "lcm.pixels.weight": Change(gradients, 0.5, {"lcm.pixels.decoder": "small decoder"}),
        "lcm.pixels.decoder": Change(
            gradients, "another small decoder", {f"lcm.{key}": v for key, v in PIXELS.items()}
        ),
        "lcm.target": Change(learnt, "average", {"optimiser.ema_decay": 0.9}),
        "gradient_checkpointing": Change(recomputed, True),
        "pictures.prompts": Change(picture, ["red"], {"pictures.steps": 1}),
        "pictures.steps": Change(picture, 2, SHOWN),
        "pictures.few": Change(picture, 2, SHOWN),
        "pictures.guidance": Change(picture, 2.0, SHOWN),
        "pictures.negative": Change(picture, "blue", SHOWN),
    },
    AutoencoderConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "autoencoder", SEEDED),
        "model.channels": Change(trained, [8, 8, 8, 16]),
        "model.layers_per_block": Change(trained, 2),
        "model.latent_channels": Change(trained, 8),
        "model.norm_groups": Change(loss, 2),
        "loss.l1": Change(loss, 2.0),
        "loss.edges": Change(loss, 2.0),
        "loss.mse": Change(loss, 2.0),
        "loss.kl": Change(loss, 2.0),
        "data.seed": Change(batch, 1),
        "crop": Change(batch, 64),
        "first_crop": Change(batch, 24, {"first_steps": 9}),
        "first_steps": Change(batch, 9),
        "around_things": Change(batch, 0.0),
        "decoder_only": Change(trained, True, {"begin_from": "autoencoder"}),
        "latent_noise": Change(batch, 0.3),
    },
    SmallDecoderConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "small decoder", SEEDED),
        "autoencoder": Change(batch, "another autoencoder"),
        "model.channels": Change(trained, 16),
        "model.blocks": Change(trained, [2, 1, 1, 1]),
        "model.encoder_channels": Change(trained, 16),
        "loss.l1": Change(loss, 2.0),
        "loss.edges": Change(loss, 2.0),
        "loss.mse": Change(loss, 2.0),
        "loss.latents": Change(loss, 2.0),
        "data.seed": Change(batch, 1),
        "data.pictures": Change(batch, 6),
        "data.cache": Change(cached, "elsewhere"),
        "crop": Change(batch, 64),
        "around_things": Change(batch, 0.0),
    },
    ClipConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "text/clip", SEEDED),
        "model.text_width": Change(trained, 32),
        "model.text_layers": Change(trained, 2),
        "model.vision_width": Change(trained, 32),
        "model.vision_layers": Change(trained, 2),
        "model.heads": Change(loss, 4),
        "model.patch": Change(trained, 64),
        "model.projection": Change(trained, 32),
        "model.length": Change(batch, 40),
        "model.merges": Change(batch, 60),
        "data.seed": Change(batch, 1),
        "text": Change(trained, "another text"),
        "hard_negatives": Change(batch, 1),
        "layout_weight": Change(loss, 0.5),
        "vectors_weight": Change(loss, 0.5),
    },
    LatentDiffusionConfig: {
        "run.seed": Change(batch, 1),
        "begin_from": Change(trained, "unet", SEEDED),
        "autoencoder": Change(batch, "another autoencoder"),
        "text": Change(loss, "another text"),
        "train_text_encoder": Change(trained, False),
        "model.channels": Change(trained, [8, 24]),
        "model.attends": Change(trained, [True, True]),
        "model.layers_per_block": Change(trained, 2),
        "model.heads": Change(loss, 4),
        "model.norm_groups": Change(loss, 2),
        "data.seed": Change(batch, 1),
        "data.pictures": Change(batch, 6),
        "data.cache": Change(cached, "elsewhere"),
        "levels.mean": Change(batch, 1.0),
        "levels.std": Change(batch, 2.0),
        "levels.uniform": Change(batch, 1.0),
        "caption_dropout": Change(batch, 1.0),
        "strange_words": Change(batch, 1.0),
        "layout_weight": Change(loss, 0.5),
        "words_weight": Change(loss, 0.5),
        "min_snr_gamma": Change(loss, 1.0),
        "often.kinds": Change(batch, list(KINDS[:14])),
        "often.times": Change(batch, 3, {"often.kinds": list(KINDS[:14])}),
        "pixels.weight": Change(loss, 0.5, {"pixels.decoder": "small decoder"}),
        "pixels.decoder": Change(loss, "another small decoder", PIXELS),
    },
}  # fmt: skip
"""What each kind of training adds, and where the seed shows in it."""

PATTERN = "attn2"
"""The modules that an override in a dictionary is for."""

REFUSED = "refused: "
"""How a look begins that ended in an error."""


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting of a section and of those inside."""
    for name, info in section.model_fields.items():
        inner = [t for t in _types(info.annotation) if issubclass(t, BaseModel)]
        depth = "*." if dict in _types(info.annotation) else ""
        for found in inner:
            yield from keys(found, f"{prefix}{name}.{depth}")
        if not inner:
            yield f"{prefix}{name}"


def _types(annotation: Any) -> list[type]:
    """The classes that an annotation is made of."""
    parts = [t for argument in get_args(annotation) for t in _types(argument)]
    origin = getattr(annotation, "__origin__", annotation)
    return [*([origin] if isinstance(origin, type) else []), *parts]


# -- the place -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path, text_folder: Path
) -> Path:
    """A folder with data sets and models under the names that the table above uses."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "autoencoder").symlink_to(autoencoder_folder)
    (folder / "text").symlink_to(text_folder)
    _write_pictures(folder / "pictures", [(64, 64), (96, 32), (32, 128), (80, 64), (64, 64)])
    rgba = np.random.default_rng(9).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(folder / "pictures" / "alpha.png")
    (folder / "pictures" / "alpha.txt").write_text("red, blue, green")
    _write_pictures(folder / "others", [(64, 64)] * 2)
    (folder / "others" / "0.txt").unlink()
    shutil.copytree(folder / "pictures", folder / "one bad")
    (folder / "one bad" / "1.png").write_bytes(b"no picture")
    _write_pictures(folder / "records", [(64, 64)])
    record = {"file_name": "0.png", "text": "red", "captions": ["blue"]}
    (folder / "records" / "metadata.jsonl").write_text(json.dumps(record))
    if find_spec("datasets"):
        _write_table(folder / "table", folder / "pictures" / "0.png")
    return folder


def _write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> None:
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red, blue, {i}, x, y")


def _write_table(folder: Path, file: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    row = {"image": {"bytes": file.read_bytes(), "path": None}, "text": "red"}
    folder.mkdir()
    for split, n in {"train": 1, "test": 2}.items():
        table = datasets.Dataset.from_list([row] * n, features)
        table.to_parquet(folder / f"{split}.parquet")


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in the place, in a world that is told in a moment."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(clip, "World", Told)
    monkeypatch.setattr(world_pictures, "MEASURED", 1)
    if find_spec("datasets"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "hf")
        rows.open_table.cache_clear()


@pytest.fixture
def models(place: Path, _inside: None) -> None:
    """What was trained before, of each kind that is not there yet."""
    if (place / "unet").exists():
        return
    adapted = lora(config_of(LoraConfig))
    with torch.no_grad():
        for value in adapted.adapter.parameters.values():
            value.add_(0.1)
    files.save(place / "adapter", adapted.adapter.weights())
    another = AutoencoderObjective(config_of(AutoencoderConfig, SEEDED))
    another.vae.save_pretrained(place / "another autoencoder")
    another_small = SmallDecoderObjective(config_of(SmallDecoderConfig, SEEDED))
    another_small.export(place / "small decoder", 0)
    third_small = SmallDecoderObjective(config_of(SmallDecoderConfig, {"run.seed": 2}))
    third_small.export(place / "another small decoder", 0)
    shutil.copytree(place / "text", place / "another text")
    encoder = CLIPTextModel.from_pretrained(place / "text" / "text_encoder")
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1)
    encoder.save_pretrained(place / "another text" / "text_encoder")
    trained_before = LatentDiffusionObjective(config_of(LatentDiffusionConfig))
    trained_before.unet.save_pretrained(place / "unet" / "unet")
    trained_before.text_encoder.save_pretrained(place / "unet" / "text_encoder")


def config_of(kind: type[TrainingConfig], values: Mapping[str, Any] = {}) -> Any:  # read only
    """The small configuration of this kind with some settings changed."""
    told = json.loads(json.dumps(BASE[kind]))
    for key, value in values.items():
        *sections, name = [PATTERN if part == "*" else part for part in key.split(".")]
        inner = told
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return kind.model_validate(told)


def seen(look: Look, config: TrainingConfig) -> Any:
    """What a look says, or the refusal."""
    try:
        return look(config)
    except UserError as error:
        return f"{REFUSED}{error}"


UNCHANGED: dict[str, Any] = {}
"""What was seen without a change: many changes are compared with the same thing."""


def unchanged(kind: type[TrainingConfig], change: Change) -> Any:
    """What is seen with `given` alone."""
    key = f"{kind.__name__} {change.look.__name__} {sorted(change.given.items())}"
    if key not in UNCHANGED:
        UNCHANGED[key] = seen(change.look, config_of(kind, change.given))
    return UNCHANGED[key]


# -- the walk --------------------------------------------------------------------------------

TABLES: dict[type[TrainingConfig], dict[str, Change]] = {TrainingConfig: SHARED, **OWN}
ENTRIES = [(kind, key, change) for kind, table in TABLES.items() for key, change in table.items()]


@pytest.mark.parametrize("kind", OWN)
def test_every_setting_has_its_entry(kind: type[TrainingConfig]) -> None:
    """A new setting needs one, and none is left of a setting that is gone."""
    assert set(keys(kind)) == SHARED.keys() | OWN[kind].keys()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "kind,key,change", ENTRIES, ids=[f"{kind.__name__}-{key}" for kind, key, _ in ENTRIES]
)
def test_changing_it_changes_something(
    kind: type[TrainingConfig], key: str, change: Change
) -> None:
    if change.needs:
        pytest.importorskip(change.needs)
    before = unchanged(kind, change)
    after = seen(change.look, config_of(kind, {**change.given, key: change.to}))
    assert before != after
    refusals = [value for value in (before, after) if str(value).startswith(REFUSED)]
    assert len(refusals) == change.refuses, refusals


@cache
def _looks() -> list[tuple[type[TrainingConfig], Look]]:
    """Every look at every kind, once."""
    named = {(kind, change.look.__name__): change.look for kind, _, change in ENTRIES}
    return [(kind, look) for (kind, _), look in named.items()]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "kind,look", _looks(), ids=[f"{kind.__name__}-{look.__name__}" for kind, look in _looks()]
)
def test_what_is_looked_at_stays_where_nothing_changes(
    kind: type[TrainingConfig], look: Look
) -> None:
    """So that a difference is the setting's doing."""
    assert seen(look, config_of(kind)) == unchanged(kind, Change(look, None))
