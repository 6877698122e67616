"""Damaged and hostile LoRA files end in our error or in a correct load, and in nothing between.

500 mutants in every run, 20,000 others in a long one, which prints what became of them:

    pytest -m slow -s tests/lora/test_hostile_loras.py
"""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from ldm_pipeline.commands.lora_info import describe
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.attach import attach, base_of
from ldm_pipeline.lora.deltas import completed
from ldm_pipeline.lora.files import inspect, load, load_whole, save
from ldm_pipeline.lora.layouts import kohya
from ldm_pipeline.lora.layouts.families import FAMILIES
from ldm_pipeline.lora.merging import stack
from ldm_pipeline.lora.resizing import Rank, resize
from ldm_pipeline.lora.targets import TEXT_MODEL
from ldm_pipeline.lora.weights import LORA_A, LORA_B
from tests.lora import test_lycoris
from tests.lora.tiny_families import lora, networks, sd1
from tests.mutations import VALUES, Mutation, cut, entry, flip, header_of, values, with_header

FEW_MUTANTS, MANY_MUTANTS = range(500), range(500, 20_500)
PARTS = 5
"""Tests that share the mutants, so that several processes can."""

FEW = ("mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "layers.0.self_attn.v_proj")

# Mutations --------------------------------------------------------------------------------------


def text(contents: bytes, dice: random.Random) -> bytes:
    """The metadata changed: one of PEFT's fields, or the whole text."""
    header, tensors = header_of(contents)
    texts = header.setdefault("__metadata__", {})
    fields = json.loads(texts.get("lora_adapter_metadata", "{}"))
    if fields and dice.random() < 0.8:
        fields[dice.choice([*fields, "unet.init_lora_weights", "unet.bias"])] = dice.choice(VALUES)
        texts["lora_adapter_metadata"] = json.dumps(fields)
    elif dice.random() < 0.5:
        texts["lora_adapter_metadata"] = dice.choice(
            ["", "[", "[]", "[" * 100_000, "1", '{"unet": 1}']
        )
    else:
        header["__metadata__"] = dice.choice(VALUES)
    return with_header(header, tensors)


MUTATIONS: tuple[Mutation, ...] = (flip, cut, entry, entry, entry, text, text, values)


# The law ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """A file of each sort: whole ones, to be mutated, and the name of what is attached."""
    folder = tmp_path_factory.mktemp("sources")
    pipe = sd1()
    files: list[tuple[Path, str]] = []
    for kind in ({}, {"dora": True}):
        weights = lora(pipe, only=FEW[:2] if kind else FEW, **kind)
        for layout in ("diffusers", "kohya", "peft"):
            place = folder / f"{layout}{len(files)}"
            files.append((save(place, weights, layout=layout, family=FAMILIES["sd1"]), layout))
    for case in ("LoHa of a convolution", "LoKr with a core", "LoCon with a core", "difference"):
        name, parts, _ = test_lycoris.CASES[case]
        place = folder / case
        place.mkdir()
        files.append((test_lycoris.written(place, name, parts), case))
    bare = folder / "bare.safetensors"
    save_file(lora_without_header(), bare)
    return [*files, (bare, "bare")]


def lora_without_header() -> dict[str, torch.Tensor]:
    key = "unet.mid_block.attentions.0.proj_in"
    return {
        f"{key}.{LORA_A}": torch.randn(2, 16, 1, 1),
        f"{key}.{LORA_B}": torch.randn(16, 2, 1, 1),
    }


def mutated(source: Path, place: Path, dice: random.Random) -> Path:
    """A mutant of a file, or of one file of PEFT's folder."""
    mutation = dice.choice(MUTATIONS)
    if source.is_dir():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        inner = dice.choice(sorted(place.iterdir()))
        if dice.random() < 0.4:
            config = inner / "adapter_config.json"
            fields = json.loads(config.read_text())
            fields[dice.choice([*fields, "modules_to_save"])] = dice.choice(VALUES)
            contents = json.dumps(fields).encode()
            config.write_bytes(cut(contents, dice) if dice.random() < 0.2 else contents)
            return place
        file = inner / "adapter_model.safetensors"
        file.write_bytes(mutation(file.read_bytes(), dice))
        return place
    place = place.with_suffix(".safetensors")
    place.write_bytes(mutation(source.read_bytes(), dice))
    return place


def state(pipe: Any) -> Any:
    """All that an adapter would change, but for the weights, which loading never touches."""
    return [
        ([(n, id(m)) for n, m in model.named_modules()], sorted(getattr(model, "peft_config", {})))
        for model in networks(pipe).values()
    ]


def use(place: Path) -> None:
    """What `ldm lora` does with a file that no model is at hand for: it works or is refused."""
    with suppress(UserError):
        weights = load_whole(place)
        assert list(describe(inspect(place), weights))
        assert resize(weights, Rank(most=1)).weights
        assert kohya.spelled(weights, FAMILIES["sd1"])
        assert stack([(weights, 0.5)])


def check(pipe: Any, place: Path) -> bool:
    """Whether `place` was loaded; asserts that it was wholly, or that nothing changed."""
    before = state(pipe)
    names: tuple[str, ...] = ()
    with suppress(UserError):
        names = attach(pipe, [(place, 1.0)])
    if not names:
        assert state(pipe) == before
        return False
    (name,) = names
    weights = completed(load(place), base_of(networks(pipe)))
    loaded = {}
    for component, model in networks(pipe).items():
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                loaded[component, path.removeprefix(TEXT_MODEL)] = layer
    assert loaded.keys() == set(weights.modules())
    for (component, module), layer in loaded.items():
        parts = weights.parts(component, module)
        assert torch.equal(layer.lora_A[name].weight, parts[LORA_A].float())
        assert torch.equal(layer.lora_B[name].weight, parts[LORA_B].float())
        assert layer.scaling[name] == pytest.approx(weights.layouts[component].scale(module))
    pipe.unload_lora_weights()
    return True


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    "mutants",
    [FEW_MUTANTS, pytest.param(MANY_MUTANTS, marks=pytest.mark.slow)],
    ids=lambda mutants: str(len(mutants)),
)
def test_a_mutant_is_refused_or_loaded_wholly(
    mutants: range, part: int, sources: list[tuple[Path, str]], tmp_path: Path
) -> None:
    pipe = sd1()
    loaded = 0
    mine = mutants[part::PARTS]
    for number in mine:
        dice = random.Random(number)
        source, _ = dice.choice(sources)
        try:
            mutant = mutated(source, tmp_path / "mutant", dice)
            loaded += check(pipe, mutant)
            use(mutant)
        except BaseException as error:
            error.add_note(f"mutant {number} of {source}")
            raise
    print(f"{len(mine)} mutants: {loaded} loaded wholly, {len(mine) - loaded} refused")
    assert 0 < loaded < len(mine), "some mutants are harmless, and most are not"


def test_the_whole_files_are_loaded(sources: list[tuple[Path, str]]) -> None:
    pipe = sd1()
    assert all(check(pipe, source) for source, _ in sources)
