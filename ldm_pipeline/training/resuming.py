"""What a run may be told anew when it goes on: all but what its saved numbers mean.

A checkpoint's tensors show an adapter's rank, but not its scale, the model below it or how many
heads a network has: the same numbers would go on as another model's. So each group of settings
names those that a run keeps to its end (`Settings.kept_on_resume`), and they are compared with the
`config.yaml` that the run wrote when it was last started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.config import Settings, TrainingConfig, read_yaml

log = logging.getLogger(__name__)

FILE_NAME = "config.yaml"

UNSET = object()
"""Stands for a setting that was not there: of another version, or of a section left out."""


def check_resume(config: TrainingConfig) -> None:
    """Raise UserError where the run in `run.out` cannot go on with `config`; reads YAML alone."""
    out = config.run.out
    if any((out / checkpoint.FOLDER).glob("step-*")):
        refuse_other_meaning(config, earlier_settings(out), out)


def say_what_changed(config: TrainingConfig) -> None:
    """Tell in one line how the settings of a run that goes on are not what it was last told."""
    out = config.run.out
    earlier = earlier_settings(out)
    if not earlier:
        log.warning("%s cannot be read: whether settings changed is not known", out / FILE_NAME)
        return
    told = changes(config, earlier)
    if told:
        log.info("settings that changed: %s", told)


def earlier_settings(out: Path) -> dict[str, Any]:
    """What the run in `out` was last told, in sections; nothing where that cannot be read."""
    try:
        return read_yaml(out / FILE_NAME)
    except UserError:
        return {}


def refuse_other_meaning(config: TrainingConfig, earlier: Mapping[str, Any], place: Path) -> None:
    """Raise UserError where `config` has another value of what a run keeps to its end.

    `earlier` are settings in sections, `place` is what was begun with them. What they do not name
    is passed over: an older version wrote no settings that it did not have.
    """
    earlier = spelt_out(config, earlier)
    asked = spelt_out(config, config.model_dump(mode="json"))
    odd = []
    for key in kept_settings(config):
        before, now = _at(earlier, key), _at(asked, key)
        if before is not UNSET and before != now and not _one_place(before, now):
            odd.append(f"{key}={_told(before)}, not {_told(now)}")
    if odd:
        raise UserError(
            f"{place} was begun with {'; '.join(odd)}: its numbers would mean something else; "
            "choose another run.out, or ask for the same again"
        )


def changes(config: TrainingConfig, earlier: Mapping[str, Any]) -> str:
    """The settings that differ, as `key old -> new`, in one line; empty where none does."""
    told = (earlier, config.model_dump(mode="json"))
    before, now = (_flat(spelt_out(config, values)) for values in told)
    pairs = {key: (before.get(key, UNSET), now.get(key, UNSET)) for key in {**before, **now}}
    return ", ".join(
        f"{key} {_told(old)} -> {_told(new)}" for key, (old, new) in pairs.items() if old != new
    )


def kept_settings(section: Settings, prefix: str = "") -> Iterator[str]:
    """The dotted names of all that a run of these settings keeps to its end."""
    yield from (f"{prefix}{name}" for name in section.kept_on_resume())
    for name, value in section:
        if isinstance(value, Settings):
            yield from kept_settings(value, f"{prefix}{name}.")


def spelt_out(section: Settings, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` of these settings, in sections, with what nulls stand for (`Settings.spelt_out`)."""
    told = dict(section.spelt_out(values))
    for name, inner in section:
        if isinstance(inner, Settings) and isinstance(told.get(name), Mapping):
            told[name] = spelt_out(inner, told[name])
    return told


def _at(values: Any, key: str) -> Any:
    """The value at a dotted key of nested dictionaries, or UNSET."""
    for part in key.split("."):
        values = values.get(part, UNSET) if isinstance(values, Mapping) else UNSET
    return values


def _one_place(before: Any, now: Any) -> bool:
    """Whether two texts name one file or folder that is there, as by another way."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    try:
        return Path(before).samefile(now)
    except OSError:
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        deeper = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _told(value: Any) -> str:
    """A value as a configuration file may spell it."""
    return "unset" if value is UNSET else json.dumps(value, ensure_ascii=False, default=str)
