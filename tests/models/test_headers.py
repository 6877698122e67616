"""Headers of safetensors files: everything but the tensors, and only of whole files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_pipeline.errors import UserError
from ldm_pipeline.models.headers import read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A matrix, a scalar and a text."""
    path = tmp_path / "a.safetensors"
    tensors = {"m": torch.ones(2, 3, dtype=torch.bfloat16), "s": torch.tensor(1.0)}
    save_file(tensors, path, metadata={"told": "so"})
    return path


def test_names_shapes_dtypes_and_texts(file: Path) -> None:
    header = read_header(file)
    assert header.shapes == {"m": (2, 3), "s": ()}
    assert header.dtypes == {"m": "BF16", "s": "F32"}
    assert header.texts == {"told": "so"}


def test_a_file_that_is_not_whole_is_refused_in_one_line(file: Path) -> None:
    whole = file.read_bytes()
    odd = whole.replace(b"[2,3]", b'["a"]')
    for damaged in (b"", whole[:-1], whole + b"x", whole[:12], b"\xff" * 20, odd):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.safetensors is no whole safetensors") as refusal:
            read_header(file)
        assert "\n" not in str(refusal.value)


def test_an_empty_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError, match=r"opened: it is empty$"):
        read_header(tmp_path / "a.safetensors")
