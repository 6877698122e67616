"""Damaged single files end in our error or in a model, and in nothing between.

24 mutants in every run; as many as LDM_MUTATIONS says in a long one:

    LDM_MUTATIONS=2000 pytest tests/models/original/test_damaged_files.py
"""

from __future__ import annotations

import base64
import json
import os
import random
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ldm_pipeline
from ldm_pipeline.cli import main
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original import note
from ldm_pipeline.models.original.convert import to_file
from tests.models.original.models import pipeline, plain
from tests.mutations import VALUES, Mutation, cut, entry, flip, header_of, values, with_header

COUNT = int(os.environ.get("LDM_MUTATIONS", "24"))
KINDS = ("sd1", "refiner")


def files_of(texts: dict[str, str]) -> dict[str, Any]:
    """The note among a header's texts."""
    told: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(texts[note.KEY])))
    return told


def packed(told: dict[str, Any]) -> str:
    """A note as a header's text."""
    return base64.b64encode(zlib.compress(json.dumps(told).encode())).decode()


def noted(contents: bytes, dice: random.Random) -> bytes:
    """One entry of the configs that the file carries is changed, or left out."""
    header, tensors = header_of(contents)
    texts = header.get("__metadata__", {})
    if note.KEY not in texts:
        return entry(contents, dice)
    told = files_of(texts)
    name = dice.choice(sorted(name for name in told["files"] if name.endswith(".json")))
    config = json.loads(told["files"][name])
    key = dice.choice(sorted(config))
    if dice.random() < 0.2:
        del config[key]
    else:
        config[key] = dice.choice(VALUES)
    told["files"][name] = json.dumps(config)
    if dice.random() < 0.1:
        del told["files"][name]
    texts[note.KEY] = packed(told)
    return with_header(header, tensors)


MUTATIONS: tuple[Mutation, ...] = (flip, cut, entry, entry, values, noted, noted, noted)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Files of ours and of others, each with its folder."""
    found = []
    for kind in KINDS:
        place = tmp_path_factory.mktemp(kind)
        pipeline(kind).save_pretrained(place / "folder")
        to_file(place / "folder", place / "model.safetensors")
        found += [
            (place / "folder", file)
            for file in (place / "model.safetensors", plain(place / "model.safetensors"))
        ]
    return found


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet", "block_out_channels", [10**7, 10**7]),
        ("vae", "layers_per_block", 10**7),
        ("text_encoder", "num_hidden_layers", 10**7),
    ],
)
def test_a_note_cannot_ask_for_more_than_the_file_holds(
    name: str, key: str, value: Any, sources: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    """It would take all of the memory, or for ever, to build what it describes."""
    header, tensors = header_of(sources[0][1].read_bytes())
    told = files_of(header["__metadata__"])
    config = json.loads(told["files"][f"{name}/config.json"])
    told["files"][f"{name}/config.json"] = json.dumps({**config, key: value})
    header["__metadata__"][note.KEY] = packed(told)
    file = tmp_path / "greedy.safetensors"
    file.write_bytes(with_header(header, tensors))
    with pytest.raises(UserError, match=f"^{name}/config.json in .* says {key}=10000000"):
        ldm_pipeline.load(file)


@pytest.mark.parametrize("part", range(2))
def test_a_damaged_file_is_refused_or_opened(
    part: int, sources: list[tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `load`, `ldm info`, `ldm convert` and what `ldm generate` looks at before it loads."""
    file = tmp_path / "mutant.safetensors"
    opened = 0
    mine = range(part, COUNT, 2)
    for number in mine:
        dice = random.Random(number)
        folder, source = dice.choice(sources)
        file.write_bytes(dice.choice(MUTATIONS)(source.read_bytes(), dice))
        try:
            assert main(["info", str(file)]) in (0, 2)
            asked = ["generate", "x", "--model", str(file), "--device", "cuda:99", "--steps", "2"]
            assert main([*asked, *(["--lcm"] if number % 3 == 0 else [])]) == 2
            target = tmp_path / f"folder-{number}"
            told = ["--tokenizer", str(folder)] if "plain" in source.name else []
            converted = main(["convert", str(file), str(target), *told])
            assert converted in (0, 2)
            assert target.exists() == (converted == 0)
            with suppress(UserError):
                ldm_pipeline.load(file, tokenizer=folder)
                opened += 1
        except BaseException as error:
            error.add_note(f"mutant {number} of {source}")
            raise
    assert 0 < opened < len(mine), "some mutants are harmless, and most are not"
