"""Latent diffusion, end to end: draw, train, measure, analyse.

    from ldm_pipeline import LatentDiffusionPipeline
    LatentDiffusionPipeline.bundled()("a red star above a blue house").images[0]

Names are resolved on first use (PEP 562), because importing torch and diffusers takes seconds
that `ldm --help` should not spend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.memory import Memory

if TYPE_CHECKING:
    from ldm_pipeline.checkpoints import load, teach_auto_pipelines
    from ldm_pipeline.pipeline import LatentDiffusionPipeline
    from ldm_pipeline.pipeline_xl import LatentDiffusionXLPipeline
    from ldm_pipeline.request import Request

__version__ = "0.1.0"
__all__ = [
    "LatentDiffusionPipeline",
    "LatentDiffusionXLPipeline",
    "Memory",
    "Request",
    "UserError",
    "__version__",
    "load",
    "teach_auto_pipelines",
]

_HOMES = {
    "LatentDiffusionPipeline": "ldm_pipeline.pipeline",
    "LatentDiffusionXLPipeline": "ldm_pipeline.pipeline_xl",
    "load": "ldm_pipeline.checkpoints",
    "teach_auto_pipelines": "ldm_pipeline.checkpoints",
    "Request": "ldm_pipeline.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
