"""What the readers of all layouts share: tensors from files, and what no file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipeline.errors import UserError
from ldm_pipeline.lora.weights import Header
from ldm_pipeline.models.headers import FileHeader

if TYPE_CHECKING:
    from torch import Tensor

PEFT_PREFIX = "base_model.model."
"""What every key of PEFT's files begins with."""

DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
WHOLE = frozenset({"I64", "I32", "I16"})
"""Of alphas only, which some tools write as whole numbers."""


def check_dtypes(file: Path, found: FileHeader) -> None:
    """Raise `UserError` for tensors that are no floating-point numbers."""
    for key, dtype in found.dtypes.items():
        if dtype not in DTYPES and not (key.endswith(".alpha") and dtype in WHOLE):
            raise UserError(
                f"{file}: {key} has the type {dtype}; a LoRA has one of {', '.join(sorted(DTYPES))}"
            )


def key_in_header(component: str, key: str) -> str:
    """How a `Header` names a tensor: as its file does, or behind the component of that file."""
    return f"{component}.{key.removeprefix(PEFT_PREFIX)}" if component else key


def tensors_of(header: Header) -> dict[str, Tensor]:
    """Every tensor by the header's key, on the CPU; `UserError` for values that are not finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for component, file in header.files.items():
        try:
            found: Mapping[str, Tensor] = load_file(file)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        for key, tensor in found.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{file}: {key} holds values that are not finite numbers")
            tensors[key_in_header(component, key)] = tensor
    return tensors
