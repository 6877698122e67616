"""Going on with other settings: what numbers mean stays, the rest may change and is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.config import Settings, TrainingConfig, validated, write_yaml
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.resuming import (
    changes,
    check_resume,
    kept_settings,
    refuse_other_meaning,
)
from tests.training.test_config import KINDS
from tests.training.toy import Toy

RUN: dict[str, Any] = {
    "out": "run", "steps": 3, "batch_size": 4, "mixed_precision": "no", "workers": 0,
    "log_every": 1, "log_with": "none",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"begin_from": "a", "decoder_only": True},
    "decoder": {"autoencoder": "a"},
    "clip": {"text": "t"},
    "unet": {"autoencoder": "a", "text": "t", "train_text_encoder": False, "begin_from": "b"},
    "lora": {"data": {"source": "s"}},
    "lcm": {"data": {"source": "s"}},
}

REFUSED: list[tuple[str, str, Any, str]] = [
    ("lora", "model", "other", 'model="bundled", not "other"'),
    ("lora", "lora.alpha", 32.0, "lora.alpha=16.0, not 32.0"),
    ("lora", "lora.rslora", True, "lora.rslora=false, not true"),
    ("lora", "lora.overrides", {"attn2": {"alpha": 8.0}}, "lora.overrides={}"),
    ("lora", "loss.zero_terminal_snr", True, "loss.zero_terminal_snr=false"),
    ("lora", "run.seed", 1, "run.seed=0, not 1"),
    ("lora", "optimiser.kind", "muon", 'optimiser.kind="adamw", not "muon"'),
    ("lcm", "model", "other", 'model="bundled"'),
    ("lcm", "lora.alpha", 32.0, "lora.alpha=16.0"),
    ("lcm", "lcm.original_steps", 25, "lcm.original_steps=50, not 25"),
    ("lcm", "lcm.spacing", "angle", 'lcm.spacing="even", not "angle"'),
    ("lcm", "lcm.timestep_scaling", 5.0, "lcm.timestep_scaling=10.0, not 5.0"),
    ("lcm", "lcm.full", True, "lcm.full=false, not true"),
    ("unet", "autoencoder", "other", 'autoencoder="a"'),
    ("unet", "text", "other", 'text="t"'),
    ("unet", "begin_from", "other", 'begin_from="b"'),
    ("unet", "model.heads", 8, "model.heads=4, not 8"),
    ("unet", "model.norm_groups", 8, "model.norm_groups=16"),
    ("clip", "model.heads", 2, "model.heads=4"),
    ("clip", "data.seed", 1, "data.seed=0"),
    ("clip", "text", None, 'text="t"'),
    ("clip", "begin_from", "b", "begin_from=null"),
    ("autoencoder", "model.norm_groups", 2, "model.norm_groups=4"),
    ("autoencoder", "begin_from", "other", 'begin_from="a"'),
    ("decoder", "autoencoder", "other", 'autoencoder="a"'),
]

ALLOWED: list[tuple[str, str, Any]] = [
    ("lora", "run.steps", 9),
    ("lora", "optimiser.lr", 0.5),
    ("lora", "lora.formats", ["kohya"]),
    ("lora", "begin_from", "elsewhere"),  # it was read before the first step
    ("lcm", "lcm.huber", None),
    ("lcm", "lcm.stride", 2),
    ("lcm", "lcm.teacher_steps", 2),
    ("lcm", "lcm.towards_noise", 2.0),
    ("lcm", "lcm.own_pictures", 0.5),
    ("lcm", "data", {"source": "others"}),
    ("unet", "caption_dropout", 0.5),
    ("unet", "strange_words", 0.5),
]


def test_one_folder_by_another_name_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path may be written from the root, or by a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b").mkdir()

    def config(text: str) -> TrainingConfig:
        return validated(KINDS["unet"], {"run": RUN, "autoencoder": "a", "text": text}, "test")

    earlier = config("a").model_dump(mode="json")
    for same in (str(tmp_path / "a"), "link"):
        refuse_other_meaning(config(same), earlier, tmp_path)
    with pytest.raises(UserError, match='text="a", not "b"'):
        refuse_other_meaning(config("b"), earlier, tmp_path)


def test_alpha_unset_and_the_rank_given_for_it_are_one(tmp_path: Path) -> None:
    """Neither is refused after the other, nor told as a change."""
    unset = {"run": RUN, **CONFIGS["lora"]}
    one, other = (
        validated(KINDS["lora"], told, "test") for told in (unset, changed(unset, "lora.alpha", 16))
    )
    for before, now in ((one, other), (other, one)):
        earlier = before.model_dump(mode="json")
        refuse_other_meaning(now, earlier, tmp_path)
        assert changes(now, earlier) == ""


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested dictionaries with one more thing said."""
    told = json.loads(json.dumps(values))
    *sections, name = key.split(".")
    inner = told
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return told


def begun(folder: Path, kind: str) -> dict[str, Any]:
    """What a run was told that left its configuration and a checkpoint in `folder`."""
    values = {"run": {**RUN, "out": str(folder)}, **CONFIGS[kind]}
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_yaml(validated(KINDS[kind], values, "test"), folder / "config.yaml")
    return values


@pytest.mark.parametrize(
    "kind,key,value,said", REFUSED, ids=[f"{kind}-{key}" for kind, key, *_ in REFUSED]
)
def test_what_gives_the_numbers_their_meaning_stays(
    tmp_path: Path, kind: str, key: str, value: Any, said: str
) -> None:
    values = begun(tmp_path, kind)
    check_resume(validated(KINDS[kind], values, "test"))
    other = validated(KINDS[kind], changed(values, key, value), "test")
    with pytest.raises(UserError) as refusal:
        check_resume(other)
    assert str(refusal.value).startswith(f"{tmp_path} was begun with ")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind,key,value", ALLOWED, ids=[f"{k}-{key}" for k, key, _ in ALLOWED])
def test_the_rest_may_change(tmp_path: Path, kind: str, key: str, value: Any) -> None:
    values = begun(tmp_path, kind)
    check_resume(validated(KINDS[kind], changed(values, key, value), "test"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_are_settings(tmp_path: Path, kind: str) -> None:
    """No misspelt name, which would keep nothing."""
    values = begun(tmp_path, kind)
    config = validated(KINDS[kind], values, "test")
    told = config.model_dump(mode="json")
    for key in kept_settings(config):
        inner: Any = told
        for part in key.split("."):
            assert part in inner, key
            inner = inner[part]


def test_an_older_version_did_not_know_every_setting(tmp_path: Path) -> None:
    values = begun(tmp_path, "lora")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del written["lora"]["rslora"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_resume(validated(KINDS["lora"], changed(values, "lora.rslora", True), "test"))


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    values = begun(tmp_path, "lora")
    (tmp_path / "checkpoints" / "step-00000001").rmdir()
    check_resume(validated(KINDS["lora"], changed(values, "lora.alpha", 32.0), "test"))


# -- in a run --------------------------------------------------------------------------------


class ScaledSettings(Settings):
    """A section with something that a run keeps, and something that it does not."""

    alpha: float = 1.0
    note: str = "one"

    def kept_on_resume(self) -> tuple[str, ...]:
        """How much numbers count for."""
        return ("alpha",)


class ScaledConfig(TrainingConfig):
    """A toy's configuration with such a section."""

    scaled: ScaledSettings = ScaledSettings()


def config_of(out: Path, **scaled: Any) -> ScaledConfig:
    """A short run of a toy."""
    return ScaledConfig.model_validate({"run": {**RUN, "out": out}, "scaled": scaled})


def test_a_run_refuses_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    """Also config.yaml, the trace of what was asked for first."""
    config = config_of(tmp_path)
    fit(Toy(config), config)
    before = (tmp_path / "config.yaml").read_bytes()
    other = config_of(tmp_path, alpha=2.0)
    with pytest.raises(UserError, match=r"was begun with scaled\.alpha=1\.0, not 2\.0"):
        fit(Toy(other), other)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_it_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    fit(Toy(config), config)

    def build(config: ScaledConfig) -> Toy:
        raise AssertionError("built")

    monkeypatch.setattr("sys.argv", ["toy", f"--run.out={tmp_path}", "--scaled.alpha=2"])
    with pytest.raises(SystemExit) as ended:
        launch(ScaledConfig, build)
    assert ended.value.code == 2
    assert "scaled.alpha=1.0, not 2.0" in capsys.readouterr().err


def test_what_else_changed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def said() -> list[str]:
        lines = [m for m in caplog.messages if "settings" in m]
        caplog.clear()
        return lines

    first = config_of(tmp_path)
    fit(Toy(first), first)
    assert said() == []
    fit(Toy(first), first)
    assert said() == []
    other = config_of(tmp_path, note="two")
    other = other.model_copy(update={"run": other.run.model_copy(update={"steps": 4})})
    fit(Toy(other), other)
    assert said() == ['settings that changed: run.steps 3 -> 4, scaled.note "one" -> "two"']
    fit(Toy(other), other)
    assert said() == []


def test_where_the_earlier_settings_are_gone_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint itself still tells the seed."""
    config = config_of(tmp_path)
    fit(Toy(config), config)
    (tmp_path / "config.yaml").unlink()
    another = config.model_copy(update={"run": config.run.model_copy(update={"seed": 8})})
    with pytest.raises(UserError, match=r"step-00000003 was begun with run\.seed=0, not 8"):
        fit(Toy(another), another)
    fit(Toy(config), config)
    assert f"{tmp_path / 'config.yaml'} cannot be read" in caplog.text
