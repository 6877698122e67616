"""What a training run is told: YAML and command-line overrides, checked before anything loads.

Every field is typed, documented by its description and closed: a key that no field has is refused
with the nearest name. `parse(Config, argv)` reads

    --config FILE                 a YAML file with any of the fields
    --section.key VALUE           an override of one field (also --section.key=VALUE), in YAML; for
                                  a text or a path the VALUE as it stands, or null for none
    --help                        the fields, their types and defaults

and returns a frozen value. Nothing is read from the environment.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ldm_pipeline.errors import UserError, nearest, suggestion

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

Precision = Annotated[
    Literal["auto", "no", "bf16", "fp16"],
    BeforeValidator(lambda value: "no" if value is False else value),
]
"""YAML reads a bare `no` as false; here it means what it says."""

NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What the YAML reader raises: dates that no calendar has and endless nesting included."""

PLAIN = {
    "model_type": "must be a section of keys, as {{key: value}}",
    "dict_type": "must be a section of keys, as {{key: value}}",
    "tuple_type": "must be a list, as [a, b]",
    "string_type": "must be a text",
    "path_type": "must be a path",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_long": "must have at most {max_length} entries",
    "invalid_key": "is no name of a setting",
}
"""What a person is told of a wrong value, by pydantic's name for the mistake."""


class Settings(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_null(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `none` as a text; where no text is wanted it means null."""
        if value not in ("none", "None") or info.field_name is None:
            return value
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        return None if NoneType in kinds and not kinds & {str, Path} else value

    def kept_on_resume(self) -> Collection[str]:
        """The fields, dotted where they lie deeper, that a run keeps to its end, see `resuming`."""
        return ()

    @classmethod
    def spelt_out(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same settings with what a null stands for, where that is another of them."""
        return values


class ShapeSettings(Settings):
    """The shape of a network that is trained: some of it, as heads, shows in no tensor's shape."""

    def kept_on_resume(self) -> Collection[str]:
        """All of it."""
        return type(self).model_fields


class OptimiserSettings(Settings):
    """The optimiser and the course of its learning rate: warm up, hold, cool down to zero."""

    kind: Literal["adamw", "muon", "adafactor", "adamw8bit", "prodigy", "schedulefree"] = Field(
        default="adamw", description="all but the first three need the extra: optimisers"
    )
    lr: PositiveFloat = Field(default=1e-4, description="1 is usual for prodigy")
    betas: tuple[Part, Part] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.01
    eps: PositiveFloat = 1e-8
    warmup_steps: NonNegative = 100
    cooldown_steps: NonNegative = 0
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Fraction = Field(default=0.999, description="0: no moving average of weights")

    def kept_on_resume(self) -> Collection[str]:
        """What is saved of an optimiser is of its kind."""
        return ("kind",)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "schedulefree" and (self.cooldown_steps or self.ema_decay):
            raise ValueError(
                "kind=schedulefree averages weights by itself; set cooldown_steps=0 and ema_decay=0"
            )
        return self


class RunSettings(Settings):
    """Where a run writes, how long it goes on and on what it computes."""

    out: Path = Field(description="folder of the run: checkpoints, logs and the final model")
    seed: Seed = 0
    steps: Positive = 1000
    batch_size: Positive = Field(default=64, description="samples of one update, in all")
    accumulation: Positive = Field(default=1, description="pieces of a process's share")
    mixed_precision: Precision = Field(
        default="auto", description="auto: bf16 where the hardware is quicker in it"
    )
    compile: bool = Field(
        default=False,
        description="torch.compile it, anew for each size of pictures; pays on long runs",
    )
    workers: NonNegative = Field(default=1, description="processes that prepare batches")
    log_every: Positive = 50
    validate_every: Positive = 1000
    save_every: Positive = 500
    keep_checkpoints: Positive = 2
    log_with: Literal["tensorboard", "wandb", "none"] = Field(
        default="tensorboard", description="wandb needs the extra: wandb"
    )

    def kept_on_resume(self) -> Collection[str]:
        """Samples and noise of step k are those of the seed."""
        return ("seed",)


def must_divide(name: str, value: int, **multiples: Sequence[int]) -> None:
    """Raise ValueError where `value` does not divide all numbers of each named sequence."""
    for other, numbers in multiples.items():
        if any(number % value for number in numbers):
            told = ", ".join(map(str, numbers))
            raise ValueError(f"{name}={value} must divide {other}={told}")


class TrainingConfig(Settings):
    """What every training run has; each kind of training adds its own sections."""

    run: RunSettings
    optimiser: OptimiserSettings = OptimiserSettings()
    begin_from: Path | None = Field(
        default=None, description="folder of a trained model to start from, instead of from scratch"
    )


Config = TypeVar("Config", bound=TrainingConfig)

COMMAND_LINE = "command line"
"""Where values are from that no file holds."""


def parse(config: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line describes; raises UserError with the key to change."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    source: str | None = None
    values: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    while arguments:
        flag = arguments.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag!r} is no option; write --config FILE or --section.key VALUE")
        key, equals, value = flag[2:].partition("=")
        if key == "help":
            print("\n".join(["--config FILE", *_described(config)]))
            sys.exit(0)
        if not equals:
            if not arguments:
                raise UserError(f"--{key} needs a value")
            value = arguments.pop(0)
        if key == "config":
            if source is not None:
                raise UserError(f"--config is there twice, {source} and {value}; keep one of them")
            source, values = value, read_yaml(Path(value))
        else:
            overrides.append((key, value))
    for key, value in overrides:
        _put(values, key, _value(config, key, value))
    return validated(config, values, source or COMMAND_LINE, {key for key, _ in overrides})


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dictionary; raises UserError where it is missing or is something else."""
    try:
        values = _from_yaml(path.read_text(encoding="utf-8"), f"{path}:")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--config {path}: cannot be read ({why})") from error
    if values is None:
        raise UserError(f"{path}: is empty; it must hold sections with keys")
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold sections with keys, not {type(values).__name__}")
    return values


def validated(
    config: type[Config],
    values: Mapping[str, Any],
    source: str,
    overridden: Collection[str] = (),
) -> Config:
    """`values` as a `config`; a UserError names the first wrong key, and the nearest known one.

    `source` is where the values are from, but for the keys that the command line `overridden`.
    """
    try:
        return config.model_validate(values)
    except ValidationError as error:
        # A misspelt key is told before the one that is missing for it.
        errors = sorted(
            error.errors(), key=lambda one: (one["type"] != "extra_forbidden", len(one["loc"]))
        )
        key = _key(config, errors[0]["loc"])
        # One error for each type that a value may have; what is in a list is told of that alone.
        same = [one for one in errors if _key(config, one["loc"]) == key]
        first = max(same, key=lambda one: len(one["loc"]))
        if any(key == asked or key.startswith(f"{asked}.") for asked in overridden):
            source = COMMAND_LINE
        elif source != COMMAND_LINE and any(asked.startswith(f"{key}.") for asked in overridden):
            source = f"{source} with the command line"
        if first["type"] == "extra_forbidden":
            strange = [repr(one["loc"][0]) for one in errors if _is_strange(one)]
            if len(strange) > 2:
                raise UserError(
                    f"{source}: unknown keys {', '.join(strange)}; is it the configuration of "
                    "another training?"
                ) from error
            hint = _hint(config, first["loc"])
            raise UserError(f"{source}: unknown key {key!r} ({hint})") from error
        if first["type"] == "missing":
            hint = "; --config FILE reads it from a file" if source == COMMAND_LINE else ""
            raise UserError(f"{source}: {key!r} is missing{hint}") from error
        value, deeper = first["input"], isinstance(first["input"], dict)
        told = key if deeper else f"{key}={value!r}"
        whys = [_why(one) for one in same if len(one["loc"]) == len(first["loc"])]
        why = " or ".join([whys[0], *(why.removeprefix("must be ") for why in whys[1:])])
        if deeper and first["type"] in PLAIN:
            why += ", not a section of keys"
        raise UserError(f"{source}: {f'{told}: ' if told else ''}{why}") from error


def _is_strange(error: ErrorDetails) -> bool:
    """Whether a mistake is a key that no section and no value at the top has."""
    return error["type"] == "extra_forbidden" and len(error["loc"]) == 1


def _why(error: ErrorDetails) -> str:
    """What is wrong with a value, in plain words."""
    told = error.get("ctx", {})
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", told["expected"])
        return f"choose one of {', '.join(choices)}{suggestion(str(error['input']), choices)}"
    plain = PLAIN.get(error["type"])
    return plain.format(**told) if plain else error["msg"].removeprefix("Value error, ")


def _hint(config: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What an unknown key may have meant: a key of its section, or one of another by that name."""
    name, beside = str(loc[-1]), _keys_beside(config, loc)
    elsewhere: dict[str, list[str]] = {}
    for key in _leaves(config):
        elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    match = nearest(name, beside)
    if match is None or name in elsewhere:
        other = nearest(name, elsewhere)
        if other is not None:
            return f"did you mean {' or '.join(map(repr, elsewhere[other]))}?"
    return f"did you mean {match!r}?" if match else f"known: {', '.join(sorted(beside))}"


def write_yaml(config: TrainingConfig, path: Path) -> None:
    """Write the resolved configuration, defaults included, so that a run can be told again."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), "utf-8")


def _described(
    section: type[BaseModel], prefix: str = "", values: BaseModel | None = None
) -> list[str]:
    """A line for each field of a section: its flag, default, and what it is for; the default is
    that of `values`, where a configuration has the section so."""
    lines = []
    for name, field in section.model_fields.items():
        value = field.default if values is None else getattr(values, name)
        inner = _section(field.annotation)
        if inner is not None:
            told = value if isinstance(value, BaseModel) else None
            lines += _described(inner, f"{prefix}{name}.", told)
            continue
        default = "required" if field.is_required() else repr(value)
        flag = f"--{prefix}{name}"
        lines.append(f"{flag:<32} {default:<24} {field.description or ''}".rstrip())
    return lines


def _value(config: type[BaseModel], key: str, text: str) -> Any:
    """What an override's text says: itself where a text or path is wanted, else read as YAML.

    The empty text stands for itself.
    """
    kinds = _kinds(_annotation(config, key))
    if kinds - {NoneType} and kinds <= {str, Path, NoneType}:
        return None if text == "null" and NoneType in kinds else text
    return _from_yaml(text, f"--{key}: {text!r}") if text else ""


class _OnceLoader(yaml.SafeLoader):
    """A safe reader that refuses a key which is there twice: YAML's would keep the last in silence.

    It looks where a mapping is read, before keys of others are merged into it, which it may change.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping; raises UserError with the lines of a key that is there twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    first = lines[key.value]
                    raise UserError(f"has {key.value!r} in line {first} and again in line {line}")
                lines[key.value] = line
        return node


def _from_yaml(text: str, source: str) -> Any:
    """What a text says in YAML; a UserError names the `source` of one that is none."""
    loader = _OnceLoader(text)
    try:
        return loader.get_single_data()
    except UserError as error:
        raise UserError(f"{source} {error}; keep one of them") from error
    except NO_YAML as error:
        raise UserError(f"{source} is not YAML ({' '.join(str(error).split())})") from error
    finally:
        loader.dispose()


def _annotation(config: type[BaseModel], key: str) -> Any:
    """The type of the field at a dotted key; None where there is no such field."""
    return reduce(_under, key.split("."), config)


def _under(annotation: Any, part: int | str) -> Any:
    """The type of what is under a key, or at a place, of a value; None where nothing can be."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            return field.annotation if field else None
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if get_origin(kind) is tuple:
            return get_args(kind)[0]
    return None


def _key(config: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """A mistake's place as a dotted key; which of a field's types it is about is left out."""
    parts: list[str] = []
    annotation: Any = config
    for part in loc:
        if len(_kinds(annotation) - {NoneType}) == 1:
            annotation = _under(annotation, part)
            parts.append(str(part))
    return ".".join(parts)


def _kinds(annotation: Any) -> set[Any]:
    """The types of which a value may be one."""
    united = get_origin(annotation) in (Union, UnionType)
    return set(get_args(annotation)) if united else {annotation}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested dictionaries."""
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--{key}: {section!r} is a value, not a section")
        values = inner
    values[name] = value


def _keys_beside(config: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at loc[:-1] knows."""
    section = _section(reduce(_under, loc[:-1], config))
    return list(section.model_fields) if section else []


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all fields that are no sections."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field holds, always or perhaps; None for other fields."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
