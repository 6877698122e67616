"""Laws of LoRA files: stock diffusers draws the same pictures; damage is named, kills harmless."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.files import FILE_NAME, inspect, load, save
from ldm_pipeline.lora.fitting import fit
from ldm_pipeline.lora.layouts.diffusers import METADATA, parse
from ldm_pipeline.lora.targets import Slot
from tests.lora.conftest import FEW, KINDS

Build = Callable[..., dict[str, Any]]


def networks(pipe: Any) -> dict[str, Any]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def header(file: Path) -> dict[str, Any]:
    """The metadata that a file carries."""
    with safe_open(file, "pt") as opened:
        fields: dict[str, Any] = json.loads(opened.metadata()[METADATA])
    return fields


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(kind, few) for kind in KINDS for few in (FEW, ("fc1", "conv_in"))] + [("dora", "all")],
)
def test_stock_diffusers_draws_the_same_picture(
    pipe: Any, tiny: Build, adapt: Any, draw: Any, kind: str, targets: Any, tmp_path: Path
) -> None:
    plain = draw(pipe)
    settings: dict[str, Any] = {"overrides": {}} if "conv_in" in targets else {}
    adapter = adapt(pipe, kind, targets=targets, **settings)
    trained = draw(pipe)
    save(tmp_path, adapter.weights())
    stock = StableDiffusionPipeline(**tiny(), requires_safety_checker=False)
    stock.load_lora_weights(tmp_path, adapter_name="style")
    # The same operations in float32; at most the order of a sum may differ.
    assert (draw(stock) - trained).abs().max() <= 1e-6
    assert (trained - plain).abs().max() > 1e-3
    for component, model in networks(stock).items():
        parts = get_peft_model_state_dict(model, adapter_name="style")
        assert {parse(f"{component}.{key}") for key in parts} == {
            parse(key) for key in adapter.parameters if key.startswith(f"{component}.")
        }


def test_what_is_written_is_read_back(pipe: Any, adapt: Any, kind: str, tmp_path: Path) -> None:
    weights = adapt(pipe, kind).weights()
    file = save(tmp_path / "new" / "folder", weights)
    assert file == tmp_path / "new" / "folder" / FILE_NAME
    again = load(file)
    assert again.layouts == weights.layouts
    slots = again.layouts["unet"].slots
    assert slots["mid_block.attentions.0.proj_in"] == Slot(2, 7)
    assert slots["down_blocks.0.downsamplers.0.conv"] == Slot(4, 3)
    assert again.layouts["text_encoder"].slots["encoder.layers.0.self_attn.v_proj"].rank == 3
    assert again.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in weights.tensors.items())
    assert load(file.parent).layouts == weights.layouts, "a folder stands for its file"
    assert save(tmp_path / "b.safetensors", again) == tmp_path / "b.safetensors"
    assert load(tmp_path / "b.safetensors").layouts == weights.layouts


def test_the_header_says_what_decides_the_picture_and_no_more(
    pipe: Any, adapt: Any, kind: str, tmp_path: Path
) -> None:
    """Any release of PEFT knows these fields; one that it does not know, it refuses."""
    fields = header(save(tmp_path, adapt(pipe, kind, targets="attention").weights()))
    for component in networks(pipe):
        own = {k.partition(".")[2]: v for k, v in fields.items() if k.startswith(f"{component}.")}
        config = LoraConfig(**own)
        assert (config.r, config.lora_alpha) == (4, 3)
        assert (config.use_dora, config.use_rslora) == (kind == "dora", kind == "rslora")
        assert len(own) == 7
    patterns = fields["unet.rank_pattern"]
    assert set(patterns.values()) == {2}
    assert all(name.startswith("mid_block") for name in patterns)


def test_text_encoder_keys_are_those_that_most_tools_read(
    pipe: Any, adapt: Any, tmp_path: Path
) -> None:
    keys = load_file(save(tmp_path, adapt(pipe).weights()))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj.lora_linear_layer"
    assert {f"{layer}.down.weight", f"{layer}.up.weight"} <= keys.keys()


@pytest.mark.parametrize("older", [False, True])
def test_files_of_stock_diffusers_are_read(
    tiny: Build, older: bool, kind: str, tmp_path: Path
) -> None:
    stock = StableDiffusionPipeline(**tiny(), requires_safety_checker=False)
    own: dict[str, Any] = {"use_dora": kind == "dora", "use_rslora": kind == "rslora"}
    unet_config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_v"], rank_pattern={"mid_block.*.to_q": 2},
        alpha_pattern={"attn2.to_v": 5}, **own,
    )  # fmt: skip
    text_config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], **own)
    stock.unet.add_adapter(unet_config)
    stock.text_encoder.add_adapter(text_config)
    layers = [get_peft_model_state_dict(m) for m in (stock.unet, stock.text_encoder)]
    if older:
        layers = [convert_state_dict_to_diffusers(each) for each in layers]
    stock.save_lora_weights(
        tmp_path,
        *layers,
        unet_lora_adapter_metadata=unet_config.to_dict(),
        text_encoder_lora_adapter_metadata=text_config.to_dict(),
    )
    weights = load(tmp_path)
    assert fit(weights, networks(LatentDiffusionPipeline(**tiny())))
    for name, slot in weights.layouts["unet"].slots.items():
        rank = 2 if name.startswith("mid_block") and name.endswith("to_q") else 4
        assert slot == Slot(rank, 5 if name.endswith("attn2.to_v") else 8), name
    assert set(weights.layouts["text_encoder"].slots.values()) == {Slot(3, 6)}
    for layout in weights.layouts.values():
        assert (layout.dora, layout.rslora) == (kind == "dora", kind == "rslora")


def test_without_metadata_alpha_is_the_rank(pipe: Any, adapt: Any, tmp_path: Path) -> None:
    file = save(tmp_path, adapt(pipe).weights())
    save_file(load_file(file), file)
    slots = [s for layout in load(file).layouts.values() for s in layout.slots.values()]
    assert {(slot.rank, slot.alpha) for slot in slots} == {(4, 4), (2, 2), (3, 3)}


# Faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(
    pipe: Any, adapt: Any, value: float, tmp_path: Path
) -> None:
    weights = adapt(pipe).weights()
    file = save(tmp_path, weights)
    before = file.read_bytes()
    key = list(weights.tensors)[5]
    broken = replace(weights, tensors={**weights.tensors, key: weights.tensors[key] * value})
    with pytest.raises(UserError, match=key):
        save(tmp_path, broken)
    assert file.read_bytes() == before
    tensors = load_file(file)
    tensors[sorted(tensors)[3]][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(UserError, match="not finite"):
        load(file)


def test_a_killed_write_leaves_the_old_file(
    pipe: Any, adapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = adapt(pipe).weights()
    file = save(tmp_path, weights)
    before = file.read_bytes()
    other = replace(weights, tensors={n: t + 1 for n, t in weights.tensors.items()})
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        save(tmp_path, other)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2, "what the killed process had begun"
    assert load(save(tmp_path, other)).tensors.keys() == weights.tensors.keys()
    assert file.read_bytes() != before


def test_it_is_on_the_disk_before_it_has_its_name(
    pipe: Any, adapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed.append((path.name, (tmp_path / FILE_NAME).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, adapt(pipe).weights())
    (first, there), (second, there_then) = flushed
    assert first.endswith(".tmp")
    assert (there, second, there_then) == (False, tmp_path.name, True)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    pipe: Any, adapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = adapt(pipe).weights()
    file = save(tmp_path, weights)
    before = file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, weights)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_one_clear_error(
    pipe: Any, adapt: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "folder", adapt(pipe).weights())


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """`file` with its metadata changed."""
    fields = header(file)
    change(fields)
    save_file(load_file(file), file, metadata={METADATA: json.dumps(fields)})
    return file


def drop_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def add(**tensors: str) -> Callable[[Path], None]:
    """Adds tensors to a file: each a copy of the first, under another key."""

    def change(file: Path) -> None:
        old = load_file(file)
        first = old[min(old)]
        save_file({**old, **{key: first.clone() for key in tensors.values()}}, file)

    return change


def tell(**fields: Any) -> Callable[[Path], object]:
    """Changes the UNet's fields in the header."""
    named = {f"unet.{name}": value for name, value in fields.items()}
    return lambda file: rewritten(file, lambda old: old.update(named))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "there is no LoRA file"),
    "empty": (lambda file: file.write_bytes(b""), "no whole safetensors file"),
    "pickle": (lambda file: torch.save({}, file), "no whole safetensors file"),
    "header too long": (lambda file: file.write_bytes(b"\xff" * 20), "longer than the file"),
    "not JSON": (lambda file: file.write_bytes(b"\2" + b"\0" * 7 + b"[]"), "no whole"),
    "cut off": (drop_end, "should have"),
    "no tensors": (lambda file: save_file({}, file), "is no LoRA: it holds no tensors"),
    "a whole model": (
        add(key="unet.conv_in.weight"),
        "no LoRA in a layout that is known (diffusers, kohya, peft): 1 of",
    ),
    "of two layouts": (
        add(key="lora_unet_mid_block.lora_down.weight"),
        "something else, as '",
    ),
    "twice": (
        add(key="unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora.down.weight"),
        "twice",
    ),
    "changes the base": (tell(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "another rank": (tell(r=5), "says rank 5"),
    "no number": (tell(lora_alpha="many"), "metadata of unet cannot be read"),
    "no finite number": (tell(lora_alpha=float("nan")), "says alpha nan"),
    "no pattern": (tell(rank_pattern={"(": 2}), "metadata of unet cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_whole_is_one_clear_error(
    pipe: Any, adapt: Any, fault: str, tmp_path: Path
) -> None:
    file = save(tmp_path, adapt(pipe).weights())
    change, told = FAULTS[fault]
    change(file)
    with pytest.raises(UserError) as refusal:
        load(file)
    assert told in str(refusal.value)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Fitting ----------------------------------------------------------------------------------------


def test_a_file_fits_the_model_it_was_made_for(pipe: Any, adapt: Any, tmp_path: Path) -> None:
    weights = load(save(tmp_path, adapt(pipe).weights()))
    found = fit(weights, networks(pipe))
    assert found
    assert found.matched == len(weights.tensors) > 0
    assert (found.missing, found.unexpected, found.misshapen) == ((), (), ())


def test_every_key_that_does_not_fit_is_counted(
    pipe: Any, adapt: Any, kind: str, tmp_path: Path
) -> None:
    file = save(tmp_path, adapt(pipe, kind).weights())
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    tensors = load_file(file)
    del tensors[f"{layer}.lora_B.weight"]
    gone = f"{layer.replace('to_q', 'to_v')}"
    for part in [key for key in tensors if key.startswith(gone)]:
        del tensors[part]
    wide = f"{layer.replace('to_q', 'to_k')}.lora_A.weight"
    tensors[wide] = torch.ones(2, 17)
    for part in ("A", "B"):
        tensors[f"unet.mid_block.nowhere.lora_{part}.weight"] = torch.ones(2, 2)
    fields = header(file)
    save_file(tensors, file, metadata={METADATA: json.dumps(fields)})
    found = fit(load(file), networks(pipe))
    assert not found
    assert set(found.missing) == {f"{layer}.lora_B.weight", f"{gone}.lora_A.weight"}
    assert set(found.unexpected) == {f"unet.mid_block.nowhere.lora_{p}.weight" for p in "AB"}
    assert found.misshapen == (f"{wide} is [2, 17], here [2, 32]",)
    assert found.matched == len(tensors) - 3
    text = str(found)
    assert f"{found.matched} keys matched, 2 missing (" in text
    assert "2 unexpected (" in text
    assert "1 of another shape (" in text


def test_a_component_that_the_pipeline_lacks_takes_no_key(
    pipe: Any, adapt: Any, tmp_path: Path
) -> None:
    weights = load(save(tmp_path, adapt(pipe).weights()))
    found = fit(weights, {"unet": pipe.unet})
    assert {key.partition(".")[0] for key in found.unexpected} == {"text_encoder"}
    assert not found


def test_the_header_alone_tells_the_keys_and_shapes(pipe: Any, adapt: Any, tmp_path: Path) -> None:
    weights = adapt(pipe).weights()
    found = inspect(save(tmp_path, weights))
    assert {parse(key): shape for key, shape in found.shapes.items()} == {
        parse(key): tuple(tensor.shape) for key, tensor in weights.tensors.items()
    }
    assert set(found.metadata) == {"unet", "text_encoder"}
