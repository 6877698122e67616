"""Settings: what YAML and the command line say is what a run gets, and every mistake is named."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ldm_pipeline.errors import UserError
from ldm_pipeline.training.autoencoder import AutoencoderConfig
from ldm_pipeline.training.clip import ClipConfig
from ldm_pipeline.training.config import TrainingConfig, parse, write_yaml
from ldm_pipeline.training.latent_diffusion import LatentDiffusionConfig
from ldm_pipeline.training.lcm import LcmConfig
from ldm_pipeline.training.lora import LoraConfig
from ldm_pipeline.training.small_decoder import SmallDecoderConfig

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type[TrainingConfig]] = {
    "autoencoder": AutoencoderConfig,
    "decoder": SmallDecoderConfig,
    "clip": ClipConfig,
    "unet": LatentDiffusionConfig,
    "lora": LoraConfig,
    "lcm": LcmConfig,
}
SHIPPED = [p for p in sorted(CONFIGS.glob("*.yaml")) if "run" in yaml.safe_load(p.read_text())]


def written(folder: Path, text: str) -> str:
    """A YAML file with this text."""
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_is_read(path: Path) -> None:
    """By the class that its name begins with, and the values are those of the file."""
    config = parse(KINDS[path.stem.partition("_")[0]], ["--config", str(path)])
    told = yaml.safe_load(path.read_text())
    assert config.run.steps == told["run"]["steps"]
    assert config.optimiser.lr == told["optimiser"]["lr"]


def test_there_are_shipped_configs_of_every_kind() -> None:
    assert {path.stem.partition("_")[0] for path in SHIPPED} == KINDS.keys()


def test_the_command_line_wins_over_the_file_in_any_order(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {out: a, steps: 3}\noptimiser: {lr: 0.5}")
    for arguments in (
        ["--config", path, "--run.steps", "7", "--optimiser.lr=1e-3"],
        ["--run.steps=7", "--optimiser.lr", "1e-3", f"--config={path}"],
    ):
        config = parse(TrainingConfig, arguments)
        assert (config.run.out, config.run.steps, config.optimiser.lr) == (Path("a"), 7, 1e-3)
        assert config.run.batch_size == 64  # what nobody mentions has its default


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_help_tells_the_defaults_that_count(
    config: type[TrainingConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """A section's own defaults may be others in a configuration that has it."""
    with pytest.raises(SystemExit) as end:
        parse(config, ["--help"])
    assert end.value.code == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert "--optimiser.lr" in told
    for flag, text in told.items():
        section, *keys = flag.removeprefix("--").split(".")
        values = config.model_fields[section].default
        if isinstance(values, BaseModel):
            assert text.startswith(repr(reduce(getattr, keys, values))), flag


def test_no_means_no_precision_also_in_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {out: a, mixed_precision: no}")
    for arguments in (["--config", path], ["--run.out=a", "--run.mixed_precision=no"]):
        assert parse(TrainingConfig, arguments).run.mixed_precision == "no"


def test_overrides_alone_are_enough() -> None:
    config = parse(TrainingConfig, ["--run.out", "x", "--optimiser.betas", "[0.5, 0.6]"])
    assert config.optimiser.betas == (0.5, 0.6)


def test_a_written_config_is_read_back_the_same(tmp_path: Path) -> None:
    config = parse(ClipConfig, ["--run.out", "x", "--run.steps", "9", "--model.heads", "2"])
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(ClipConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_settings_are_frozen() -> None:
    config = parse(TrainingConfig, ["--run.out", "x"])
    for value, name in ((config, "run"), (config.run, "steps"), (config.optimiser, "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, name, 1)


@pytest.mark.parametrize("text", ["2024", "1.50", "no", "a: b", "[1", "a #2", "2024-13-45", "'q'"])
def test_texts_and_paths_are_what_stands_there(text: str) -> None:
    """Whatever YAML would make of them."""
    told = ["--run.out", text, "--model", text, "--data.source", text, "--begin_from", text]
    config = parse(LoraConfig, [*told, "--data.captions.key", text])
    assert (config.run.out, config.begin_from) == (Path(text), Path(text))
    assert config.model == config.data.source == config.data.captions.key == text


def test_null_is_none_and_so_is_none_where_no_text_is_wanted(tmp_path: Path) -> None:
    path = written(tmp_path, "run: {out: a}\nbegin_from: b\nworld: {}\nlcm: {huber: none}")
    config = parse(LcmConfig, ["--config", path])
    assert (config.begin_from, config.lcm.huber) == (Path("b"), None)
    for word in ("null", "none", "None"):
        told = ["--run.out=a", "--world.seed=1", "--lcm.huber", word]
        assert parse(LcmConfig, told).lcm.huber is None
    assert parse(LcmConfig, ["--config", path, "--begin_from", "null"]).begin_from is None
    lora = ["--run.out=a", "--data.source=s", "--data.captions.default=none"]
    assert parse(LoraConfig, lora).data.captions.default == "none"
    assert parse(LoraConfig, [*lora, "--loss.weighting=none"]).loss.weighting == "none"
    with pytest.raises(UserError, match=r"run\.steps='none'"):
        parse(LoraConfig, [*lora, "--run.steps=none"])


OUT = ["--run.out", "x"]

ON_THE_COMMAND_LINE = {
    "a word": (["steps"], "'steps' is no option"),
    "no value": (["--run.steps"], "--run.steps needs a value"),
    "no file": (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
    "missing key": ([], "'run' is missing; --config FILE reads it from a file"),
    "missing inner key": (["--run.steps", "1"], "'run.out' is missing"),
    "unknown key": ([*OUT, "--optimiser.learning_rat", "1"], "unknown key"),
    "section for a value": ([*OUT, "--run.steps=1", "--run.steps.more=1"], "'steps' is a value"),
    "value for a section": ([*OUT, "--optimiser", "1"], "optimiser=1: "),
    "wrong type": ([*OUT, "--run.steps", "many"], "run.steps='many': "),
    "fraction for a count": ([*OUT, "--run.steps", "1.5"], "run.steps=1.5: "),
    "zero": ([*OUT, "--run.steps", "0"], "run.steps=0: "),
    "negative": ([*OUT, "--run.seed", "-1"], "run.seed=-1: "),
    "NaN": ([*OUT, "--optimiser.lr", ".nan"], "optimiser.lr=nan: "),
    "infinite": ([*OUT, "--optimiser.max_grad_norm", ".inf"], "optimiser.max_grad_norm=inf: "),
    "above one": ([*OUT, "--optimiser.ema_decay", "1.5"], "optimiser.ema_decay=1.5: "),
    "no choice": ([*OUT, "--run.mixed_precision", "fp8"], "run.mixed_precision='fp8': "),
    "empty": ([*OUT, "--run.steps="], "run.steps='': "),
    "no YAML": ([*OUT, "--run.steps", "[1"], "--run.steps: '[1' is not YAML"),
    "no date": ([*OUT, "--run.steps", "2024-13-45"], "--run.steps: '2024-13-45' is not YAML"),
    "too deep": ([*OUT, "--run.steps", "[" * 1000], "is not YAML"),
    "short pair": ([*OUT, "--optimiser.betas", "[0.9]"], "optimiser.betas"),
    "long pair": ([*OUT, "--optimiser.betas", "[0, 0, 0]"], "must have at most 2 entries"),
    "list for a section": (["--run", "[1]"], "run=[1]: must be a section of keys, as {key: value}"),
    "section for a number": (
        [*OUT, "--run.seed", "{a: 1}"],
        "command line: run.seed: must be a whole number, not a section of keys",
    ),
    "a range in words": ([*OUT, "--run.steps", "0"], "must be more than 0"),
    "near a choice": ([*OUT, "--optimiser.kind", "adam"], "schedulefree; did you mean 'adamw'?"),
    "in another section": ([*OUT, "--lr", "1"], "'lr' (did you mean 'optimiser.lr'?)"),
    "in another, misspelt": ([*OUT, "--batchsize", "1"], "did you mean 'run.batch_size'?"),
    "twice in one": ([*OUT, "--optimiser", "{lr: 1, lr: 2}"], "has 'lr' in line 1 and again in"),
}


@pytest.mark.parametrize("case", ON_THE_COMMAND_LINE)
def test_mistakes_on_the_command_line(case: str) -> None:
    arguments, said = ON_THE_COMMAND_LINE[case]
    with pytest.raises(UserError) as caught:
        parse(TrainingConfig, arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


IN_A_FILE = {
    "unknown key": ("run: {out: x}\noptimiser: {wieght_decay: 1}", "did you mean 'weight_decay'?"),
    "unknown section": ("run: {out: x}\noptimizer: {lr: 1}", "did you mean 'optimiser'?"),
    "nothing near": ("run: {out: x, zzz: 1}", "known: "),
    "wrong range": ("run: {out: x, batch_size: 0}", "run.batch_size=0: "),
    "no mapping": ("- 1\n- 2", "must hold sections with keys, not list"),
    "nothing": ("", "is empty; it must hold sections with keys"),
    "no YAML": ("run: {out: x", "is not YAML"),
    "an object": ("run: !!python/object/apply:os.getcwd []", "is not YAML"),
    "a number as key": ("run: {out: x}\n1: 2", "1"),
    "empty section": ("run:", "run=None: "),
    "a key twice": (
        "run:\n  out: x\n  seed: 1\n  seed: 2",
        "has 'seed' in line 3 and again in line 4",
    ),
    "a section twice": ("run: {out: x}\nrun: {out: y}", "has 'run' in line 1 and again in line 2"),
}


@pytest.mark.parametrize("case", IN_A_FILE)
def test_mistakes_in_a_file(case: str, tmp_path: Path) -> None:
    """Each names the file."""
    text, said = IN_A_FILE[case]
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        parse(TrainingConfig, ["--config", path])
    assert said in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


IN_AN_ADAPTER_S = {
    "a text for a list": (["--pictures.prompts", "a cat"], "prompts='a cat': must be a list, as"),
    "one of two types": (["--lora.targets", "3"], "lora.targets=3: must be a text or a list, as"),
    "a misspelt set": (
        ["--config", str(CONFIGS / "lora_tiny.yaml"), "--lora.targets", "atention"],
        "lora_tiny.yaml with the command line: lora: targets='atention' is not known",
    ),
    "what is in a list": (["--lora.targets", "[3]"], "lora.targets=3: must be a text"),
    "near one in a list": (["--lora.formats", "[kohyya]"], "did you mean 'kohya'?"),
    "below a pattern": (["--lora.overrides", "{q: {rnk: 3}}"], "did you mean 'rank'?"),
    "in two sections": (["--steps", "3"], "did you mean 'run.steps' or 'pictures.steps'?"),
    "misspelt and so missing": (["--data.sorce", "s"], "did you mean 'source'?"),
    "one file after another": (
        ["--config", str(CONFIGS / "lora_tiny.yaml"), "--config", "other.yaml"],
        "lora_tiny.yaml and other.yaml; keep one of them",
    ),
    "in a section of no file": (
        ["--data.resolution", "100"],
        "command line: data: resolution=100 must be",
    ),
    "against what a file says": (
        ["--config", str(CONFIGS / "lora_tiny.yaml"), "--data.resolution", "100"],
        "lora_tiny.yaml with the command line: data: width=100 must be a multiple of 8",
    ),
    "another training's": (
        ["--config", str(CONFIGS / "unet_tiny.yaml")],
        "'text', 'train_text_encoder', 'layout_weight', 'words_weight'; is it the configuration of",
    ),
}


@pytest.mark.parametrize("case", IN_AN_ADAPTER_S)
def test_mistakes_in_the_configuration_of_an_adapter(case: str) -> None:
    """Which has lists, patterns, and values of one type or another."""
    arguments, said = IN_AN_ADAPTER_S[case]
    source = [] if case == "misspelt and so missing" else ["--data.source", "s"]
    with pytest.raises(UserError) as caught:
        parse(LoraConfig, [*arguments, *OUT, *source])
    assert said in str(caught.value)
    assert "command line with" not in str(caught.value)
    assert "Input" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_may_be_merged_into_a_mapping_that_has_them(tmp_path: Path) -> None:
    """YAML's own way to take one over: only what is written twice is refused."""
    path = written(tmp_path, "run: &a {out: x, seed: 1}\noptimiser: {<<: {lr: 1, eps: 2}, lr: 3}")
    config = parse(TrainingConfig, ["--config", path])
    assert (config.optimiser.lr, config.optimiser.eps) == (3.0, 2.0)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(UserError, match="not a text file"):
        parse(TrainingConfig, ["--config", str(tmp_path / "some.yaml")])


def test_every_field_can_be_misspelt_but_not_in_silence() -> None:
    for name in TrainingConfig.model_fields["optimiser"].annotation.model_fields:  # type: ignore[union-attr]  # it is a Settings class
        with pytest.raises(UserError, match=f"did you mean '{name}'"):
            parse(TrainingConfig, [*OUT, f"--optimiser.{name}x", "1"])
