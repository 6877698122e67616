"""What every training of an adapter is told: which model, which of its modules, what is shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ldm_pipeline.lora.targets import LoraSettings, Override
from ldm_pipeline.training.config import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    TrainingConfig,
)


class OverrideSettings(Settings):
    """What differs in the modules that a pattern matches."""

    rank: Positive | None = None
    alpha: PositiveFloat | None = None


class AdapterSettings(Settings):
    """Which modules are adapted, and how; see `lora.targets`."""

    targets: str | tuple[str, ...] = Field(
        default="attention",
        description="attention, attention+feedforward, all, or a list of patterns",
    )
    rank: Positive = 16
    alpha: PositiveFloat | None = Field(default=None, description="rank, unless given")
    dora: bool = False
    rslora: bool = False
    overrides: dict[str, OverrideSettings] = Field(
        default={}, description="pattern: {rank, alpha} where they differ"
    )
    formats: tuple[Literal["diffusers", "kohya", "peft"], ...] = Field(
        default=("diffusers",), description="layouts of the file; diffusers' is always written"
    )

    def kept_on_resume(self) -> Collection[str]:
        """The values of an adapter mean what its modules, its scale and its kind make of them."""
        return [name for name in type(self).model_fields if name != "formats"]

    @classmethod
    def spelt_out(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Alpha is the rank, unless it is given."""
        rank = values.get("rank")
        if rank is None or values.get("alpha", rank) is not None:
            return values
        return {**values, "alpha": float(rank)}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.settings()
        return self

    def settings(self) -> LoraSettings:
        """The same as `lora` takes it."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        overrides = {p: Override(o.rank, o.alpha) for p, o in self.overrides.items()}
        return LoraSettings(targets, self.rank, self.alpha, self.dora, self.rslora, overrides)


class PictureSettings(Settings):
    """What is drawn at each validation, with the adapter and without it, from fixed seeds."""

    prompts: tuple[str, ...] = ()
    steps: Positive = 25
    guidance: NonNegativeFloat = 5.0
    negative: str = ""


class AdapterConfig(TrainingConfig):
    """What every training of an adapter is told."""

    model: str = Field(default="bundled", description="bundled, a folder, a file or a hub id")
    lora: AdapterSettings = AdapterSettings()
    gradient_checkpointing: bool = False
    pictures: PictureSettings = PictureSettings()

    def kept_on_resume(self) -> Collection[str]:
        """An adapter is a difference from one model."""
        return ("model",)
