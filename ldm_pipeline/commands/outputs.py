"""Where results go: checked before any model loads, so that no minute of drawing is lost."""

from __future__ import annotations

from pathlib import Path

from ldm_pipeline.errors import UserError
from ldm_pipeline.picture_files import format_of
from ldm_pipeline.replacing import temporary_name

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of weights as torch pickles them: no folder is meant by such a name."""


def check_picture(path: Path) -> Path:
    """`path`, if a picture can be written there; else a `UserError` that says why not.

    The answer comes from trying: a file in the making is created beside it and removed, since
    permissions alone do not tell (a read-only disk, a privileged user, a virtual folder).
    """
    format_of(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    _check_parent(path)
    return path


def check_folder(path: Path) -> Path:
    """`path`, if it is missing or an empty folder, and can be made; else a `UserError`."""
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write {path}: it is a file, not a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"cannot write {path}: it is not empty; name a new folder")
    if path.is_dir() and path.samefile("."):  # it is replaced as a whole, under one's feet
        raise UserError(f"cannot write {path}: it is the folder that you are in; name a new one")
    _check_parent(path)
    return path


def check_weights(path: Path, *, folder: bool) -> Path:
    """`path`, if weights can be written there, else a `UserError`: a file, which must be new, or
    a folder; `folder` says that it has to be one."""
    if path.suffix in PICKLED:
        raise UserError(
            f"cannot write {path}: weights are written as .safetensors only, alone or in a folder"
        )
    if path.suffix != ".safetensors":
        return check_folder(path)
    if folder:
        raise UserError(f"cannot write {path}: this layout is a folder, not a .safetensors file")
    if path.exists():
        raise UserError(f"cannot write {path}: it is there already; name a new file")
    _check_parent(path)
    return path


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    trial = temporary_name(path)
    try:
        trial.open("xb").close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    trial.unlink(missing_ok=True)
