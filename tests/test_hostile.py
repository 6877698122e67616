"""Hostile models: every one is refused in one line, and nothing of it runs or leads elsewhere.

A model is built once; each case spoils a copy of it. While it is opened, an audit hook
(`sys.addaudithook`) notes every import, every `exec` and every file that is opened. What a refusal
may touch is the model itself and the installed packages.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm_pipeline
from ldm_pipeline.cli import main
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.original.convert import to_file

EVIL = "raise SystemExit('ran')\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_SEEN: list[tuple[str, str]] | None = None
"""(event, what it was about), while a model is being opened."""


def _hook(event: str, told: tuple[Any, ...]) -> None:
    if _SEEN is None:
        return
    if event == "open" and isinstance(told[0], str | bytes | os.PathLike):
        _SEEN.append((event, os.fsdecode(told[0])))
    elif event == "import":
        _SEEN.append((event, str(told[0])))
    elif event == "exec":
        _SEEN.append((event, str(getattr(told[0], "co_filename", told[0]))))
    elif event in ("os.system", "subprocess.Popen", "pickle.find_class", "socket.connect"):
        _SEEN.append((event, str(told[0])))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Within the block, what happens is noted."""
    global _SEEN
    seen: list[tuple[str, str]] = []
    _SEEN = seen
    try:
        yield seen
    finally:
        _SEEN = None


class Payload:
    """What a pickle runs when it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder, and beside it things that no folder may reach."""
    from tests.conftest import build

    place = tmp_path_factory.mktemp("hostile")
    ldm_pipeline.LatentDiffusionPipeline(**build()).save_pretrained(place / "good")
    (place / "secret.json").write_text('{"secret": 1}')
    shutil.copy(place / "good" / "vae" / WEIGHTS, place / "secret.safetensors")
    to_file(place / "good", place / "good.safetensors")
    ldm_pipeline.load(place / "good")  # everything that a good model imports is imported
    ldm_pipeline.load(place / "good.safetensors")
    return place


def edit(file: str, **entries: Any) -> Callable[[Path], None]:
    """Set entries in a JSON file of the model."""

    def spoil(folder: Path) -> None:
        path = folder / file
        contents = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**contents, **entries}))

    return spoil


def put(file: str, contents: bytes | str) -> Callable[[Path], None]:
    """Write a file into the model."""

    def spoil(folder: Path) -> None:
        raw = contents.encode() if isinstance(contents, str) else contents
        (folder / file).write_bytes(raw)

    return spoil


def link(file: str, target: str) -> Callable[[Path], None]:
    """Put a link into the model, where a file or a folder was."""

    def spoil(folder: Path) -> None:
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def only_pickles(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    torch.save({"a": Payload()}, folder / "unet" / "diffusion_pytorch_model.bin")


def fifo(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")


def shards(name: str) -> Callable[[Path], None]:
    """An index by which the UNet's weights are in `name`."""

    def spoil(folder: Path) -> None:
        (folder / "unet" / WEIGHTS).rename(folder / "unet" / "a.safetensors")
        weights = dict.fromkeys(load_file(folder / "unet" / "a.safetensors"), name)
        index = {"metadata": {}, "weight_map": weights}
        (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return spoil


def header(text: str, tail: bytes = b"") -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + tail


OVERLAP = (
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    '"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
LYING = '{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}'
UNET = ["diffusers", "UNet2DConditionModel"]

FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    # Code
    "own pipeline class": (
        both(edit("model_index.json", _class_name=["evil", "Evil"]), put("evil.py", EVIL)),
        "its own pipeline code",
    ),
    "pipeline class in a mapping": (
        edit("model_index.json", _class_name={"evil": "Evil"}),
        "its own pipeline code",
    ),
    "custom pipeline": (
        both(edit("model_index.json", custom_pipeline="evil"), put("evil.py", EVIL)),
        "its own pipeline code",
    ),
    "auto_map in the index": (
        edit("model_index.json", auto_map={"AutoModel": "evil.Evil"}),
        "auto_map",
    ),
    "auto_map in a config": (
        both(
            edit("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}),
            put("text_encoder/evil.txt", EVIL),
        ),
        "auto_map",
    ),
    "auto_map in a tokenizer": (
        edit("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "auto_map",
    ),
    "class of the standard library": (
        edit("model_index.json", unet=["os", "system"]),
        r"names os\.system as its unet",
    ),
    "class of a module beside it": (
        both(edit("model_index.json", unet=["evil", "Evil"]), put("evil.py", EVIL)),
        r"names evil\.Evil as its unet",
    ),
    "class of our own package": (
        edit("model_index.json", unet=["ldm_pipeline.cli", "main"]),
        "as its unet",
    ),
    "function of diffusers": (
        edit("model_index.json", unet=["diffusers", "load_image"]),
        "as its unet",
    ),
    "library with a path": (
        edit("model_index.json", scheduler=["../evil", "EvilScheduler"]),
        "as its scheduler",
    ),
    "scheduler of elsewhere": (
        edit("model_index.json", scheduler=["subprocess", "PopenScheduler"]),
        "as its scheduler",
    ),
    "scheduler that is none": (
        edit("model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
        "this version of diffusers has not",
    ),
    "entry of three": (edit("model_index.json", unet=[*UNET, "evil"]), "as its unet"),
    "entry of numbers": (edit("model_index.json", unet=[1, 2]), "as its unet"),
    "component that no pipeline has": (
        edit("model_index.json", extra=["transformers", "AutoModel"]),
        "a component 'extra'",
    ),
    "code in a component": (put("unet/diffusers.py", EVIL), "brings code of its own"),
    "library in a component": (put("vae/evil.so", b"\x7fELF"), "brings code of its own"),
    "kernel of the hub": (
        edit("text_encoder/config.json", attn_implementation="evil/kernel"),
        "names a kernel to fetch",
    ),
    "quantising library": (
        edit("text_encoder/config.json", quantization_config={"quant_method": "evil"}),
        "quantization_config",
    ),
    "kernel for the text half of a CLIP": (
        edit(
            "text_encoder/config.json",
            model_type="clip",
            text_config={"model_type": "clip_text_model", "attn_implementation": "evil/kernel"},
        ),
        "names a kernel to fetch",
    ),
    "kernel by its inner name": (
        edit("text_encoder/config.json", a=[{"b": {"_attn_implementation": "evil/kernel"}}]),
        "names a kernel to fetch",
    ),
    "quantising library for a half": (
        edit("text_encoder/config.json", text_config={"quantization_config": {"bits": 4}}),
        "quantization_config",
    ),
    "auto_map in a half": (
        edit("text_encoder/config.json", text_config={"auto_map": {"AutoModel": "evil.Evil"}}),
        "auto_map",
    ),
    # Pickles
    "nothing but pickles": (only_pickles, "only pickled weights"),
    "pickle called safetensors": (
        put(f"unet/{WEIGHTS}", pickle.dumps({"a": Payload()}, protocol=2)),
        "it is a pickle under this name",
    ),
    "torch's pickle called safetensors": (
        lambda folder: torch.save({"a": Payload()}, folder / "unet" / WEIGHTS),
        "it is a pickle under this name",
    ),
    "pickle beside the weights": (
        put("vae/model.fp16.safetensors", pickle.dumps(Payload())),
        "no whole safetensors",
    ),
    # Ways out of the folder
    "shard above the folder": (shards("../../secret.safetensors"), "names the shard"),
    "shard at the root": (shards("/etc/passwd"), "names the shard"),
    "shard in Windows' spelling": (shards("..\\secret.safetensors"), "names the shard"),
    "shard of a variant": (
        put(
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            '{"weight_map": {"a": "../../secret.safetensors"}}',
        ),
        "names the shard",
    ),
    "shard that is a pickle": (shards("a.bin"), "names the shard"),
    "shard that is missing": (shards("b.safetensors"), "is not there"),
    "weights by a link": (link(f"unet/{WEIGHTS}", "../../secret.safetensors"), "a link that leads"),
    "config by a link": (link("unet/config.json", "../../secret.json"), "a link that leads"),
    "index by a link": (link("model_index.json", "../secret.json"), "a link that leads"),
    "component by a link": (link("vae", "../good/vae"), "a link that leads"),
    "link to the root": (link("extra", "/"), "a link that leads"),
    "link to nowhere": (link("vae/config.json", "gone.json"), "not there"),
    "tokenizer's files elsewhere": (
        edit("tokenizer/tokenizer_config.json", vocab_file="/etc/passwd"),
        "names vocab_file",
    ),
    "tokenizer elsewhere": (
        edit("tokenizer/tokenizer_config.json", tokenizer_file="../../secret.json"),
        "names tokenizer_file",
    ),
    "adapter of another model": (
        put("text_encoder/adapter_config.json", '{"base_model_name_or_path": "/etc"}'),
        "names another model",
    ),
    # Things that are not what they should be
    "a pipe for a config": (fifo, "neither a file nor a folder"),
    "index without end": (put("model_index.json", "[" * 200_000), "nested too deeply"),
    "index that is a list": (put("model_index.json", "[]"), "must hold a JSON object"),
    "index that is no text": (put("model_index.json", b"\xff\xfe"), "cannot be read"),
    "header that is too long": (
        put(f"vae/{WEIGHTS}", struct.pack("<Q", 2**63) + b"{}"),
        "no whole safetensors",
    ),
    "header without end": (put(f"vae/{WEIGHTS}", header("[" * 200_000)), "never ends"),
    "tensors that overlap": (put(f"vae/{WEIGHTS}", header(OVERLAP, b"1234")), "begins at byte"),
    "shape that lies": (put(f"vae/{WEIGHTS}", header(LYING, b"1234")), "has 4 bytes"),
    "a network too wide for any memory": (
        edit("unet/config.json", block_out_channels=[10**7, 10**7]),
        "says block_out_channels=10000000",
    ),
    "layers without end": (
        edit("text_encoder/config.json", num_hidden_layers=10**7),
        "says num_hidden_layers=10000000",
    ),
    "component that is a file": (
        both(lambda f: shutil.rmtree(f / "vae"), put("vae", "")),
        "no such folder",
    ),
}

FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle called safetensors": (
        put("x.safetensors", pickle.dumps({"a": Payload()}, protocol=2)),
        "it is a pickle under this name",
    ),
    "torch's pickle called safetensors": (
        lambda folder: torch.save({"a": Payload()}, folder / "x.safetensors"),
        "it is a pickle under this name",
    ),
    "old pickle": (put("x.safetensors", pickle.dumps(Payload(), protocol=0)), "no whole"),
    "nothing": (put("x.safetensors", b""), "no whole safetensors"),
    "tensors that overlap": (put("x.safetensors", header(OVERLAP, b"1234")), "begins at byte"),
    "header without end": (put("x.safetensors", header("[" * 200_000)), "never ends"),
    "a folder's worth of names": (
        lambda folder: save_file({"../a": torch.ones(1)}, folder / "x.safetensors"),
        "no model in the original layout",
    ),
}


def checked(source: Path, home: Path, message: str) -> None:
    """Open `source` and see it refused, with nothing run and nothing opened outside of `home`."""
    before = set(os.listdir())
    with watched() as seen, pytest.raises(UserError, match=message) as refusal:
        ldm_pipeline.load(source)
    assert "\n" not in str(refusal.value)
    assert set(os.listdir()) == before, "a pickle was opened"
    installed = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.prefix]
    own = [str(Path(ldm_pipeline.__file__).parent), os.path.abspath("/dev/null")]
    for event, what in seen:
        if event == "open":
            real = os.path.realpath(what)
            inside = [str(home.resolve()), *installed, *own]
            assert any(real.startswith(place) for place in inside), f"{what} was opened"
        elif event == "exec":
            assert not os.path.realpath(what).startswith(str(home.resolve())), f"{what} ran"
        elif event == "import":
            assert what.partition(".")[0] not in ("evil", "subprocess_evil"), f"{what} imported"
        else:
            raise AssertionError(f"{event}: {what}")
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(model: Path, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    spoil, message = FOLDERS[name]
    shutil.copytree(model / "good", tmp_path / "bad")
    for file in ("secret.json", "secret.safetensors"):
        shutil.copy(model / file, tmp_path)
    spoil(tmp_path / "bad")
    monkeypatch.chdir(tmp_path)  # where Python would look for modules called as in the folder
    checked(tmp_path / "bad", tmp_path / "bad", message)


@pytest.mark.parametrize("name", FILES)
def test_files(model: Path, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    spoil, message = FILES[name]
    spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    checked(tmp_path / "x.safetensors", tmp_path, message)


DAMAGED: dict[str, Callable[[Path], None]] = {
    "encoder of another width": edit("text_encoder/config.json", hidden_size=64),
    "encoder of more words": edit("text_encoder/config.json", vocab_size=7),
    "width that is no number": edit("text_encoder/config.json", hidden_size="x"),
    "activation that there is not": edit("text_encoder/config.json", hidden_act="evil"),
    "tokenizer that is empty": put("tokenizer/tokenizer.json", "{}"),
    "schedule that there is not": edit("scheduler/scheduler_config.json", beta_schedule="evil"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_named_in_one_line(model: Path, tmp_path: Path, name: str) -> None:
    """Whatever the libraries raise over them; so they are in the command."""
    shutil.copytree(model / "good", tmp_path / "bad")
    DAMAGED[name](tmp_path / "bad")
    with pytest.raises(UserError, match="bad cannot be loaded: ") as refusal:
        ldm_pipeline.load(tmp_path / "bad")
    assert "\n" not in str(refusal.value)


def test_there_are_enough_of_them() -> None:
    assert len(FOLDERS) + len(FILES) >= 30


def test_the_watch_sees_what_it_should(model: Path, tmp_path: Path) -> None:
    """A good model opens under it; an import, an `exec` and an opened file are noted."""
    (tmp_path / "plain.py").write_text("x = 1\n")
    with watched() as seen:
        exec(compile("1", str(tmp_path / "plain.py"), "exec"))
        (tmp_path / "plain.py").read_text()
        pickle.loads(pickle.dumps(Path("a")))
    assert {event for event, _ in seen} >= {"exec", "open", "pickle.find_class"}
    with watched() as seen:
        assert ldm_pipeline.load(model / "good").unet is not None
    assert any(what.endswith("config.json") for event, what in seen if event == "open")


def test_other_kinds_of_files_are_refused(tmp_path: Path, capsys: Any) -> None:
    """By their names, in Python and in the command."""
    torch.save({"a": 1}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"but no \.safetensors; other kinds can run any program"):
        ldm_pipeline.load(tmp_path / "model.ckpt")
    assert main(["generate", "a star", "--model", str(tmp_path / "model.ckpt")]) == 2
    assert "other kinds can run any program" in capsys.readouterr().err


def test_the_cache_of_the_hub_may_link_to_its_blobs(model: Path, tmp_path: Path) -> None:
    """And to nothing else."""
    repository = tmp_path / "models--somebody--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(model / "good", snapshot)
    (repository / "blobs").mkdir()
    weights = snapshot / "unet" / WEIGHTS
    weights.rename(repository / "blobs" / "b")
    weights.symlink_to("../../../blobs/b")
    assert ldm_pipeline.load(snapshot).unet is not None
    weights.unlink()
    shutil.copy(model / "secret.safetensors", repository / "c.safetensors")
    weights.symlink_to("../../../c.safetensors")
    with pytest.raises(UserError, match="a link that leads"):
        ldm_pipeline.load(snapshot)
