"""Which files drew a picture: the SHA-256 of each, told in its recipe and compared by `ldm show`.

A path alone does not tell: a training that is run again writes another adapter to the same place.
What comes with the package or is published under a fixed name (`--lcm`, `--decoder small`) is told
by its name, as the model is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm_pipeline.lora.files import inspect
from ldm_pipeline.lora.layouts.peft import CONFIG
from ldm_pipeline.metadata import Recipe, quote
from ldm_pipeline.models.small_decoder import SMALL
from ldm_pipeline.models.trust import SAFE


def of_bytes(contents: bytes) -> str:
    """The SHA-256 of what was read, in hexadecimal."""
    return hashlib.sha256(contents).hexdigest()


def digests_of(
    loras: Sequence[tuple[str, float]], lcm: bool | str, decoder: str | None
) -> dict[str, str]:
    """The digest of every adapter file, and of the decoder's folder, by the name it was given."""
    found = {file: _of_lora(file) for file, _ in loras}
    if isinstance(lcm, str):
        found[lcm] = _of_lora(lcm)
    if decoder is not None and decoder != SMALL:
        found[decoder] = _of_decoder(decoder)
    return found


def changed(recipe: Recipe) -> list[str]:
    """What is to be said where the files that drew a picture are not here any more."""
    said = []
    origin = recipe.origin
    for named in (origin.image, origin.mask) if origin is not None else ():
        if named is not None:
            said += _compared("drawn out of", *named, _of_picture)
    for name, digest in recipe.digests.items():
        now = _of_decoder if name == recipe.decoder else _of_lora
        said += _compared("drawn with", name, digest, now)
    return said


def _compared(drawn: str, name: str, digest: str, now: Callable[[str], str]) -> list[str]:
    """A line where `name` is not what it was; a forged recipe may name anything."""
    shown = f"{quote(name)} (SHA-256 {quote(digest)})"
    place = os.path.expanduser(name)
    if not (os.path.isfile(place) or os.path.isdir(place)):  # a device may have no end
        return [f"{drawn} {shown}, which is not here"]
    try:
        same = now(name) == digest
    except (OSError, ValueError, RuntimeError):
        same = False
    return [] if same else [f"{drawn} {shown}, which is another file now"]


def _of_picture(name: str) -> str:
    return of_bytes(Path(name).read_bytes())


def _of_lora(name: str) -> str:
    """Of the file that `name` means, or of the several that PEFT writes."""
    weights = sorted(set(inspect(name).files.values()))
    beside = [path.with_name(CONFIG) for path in weights]
    return _of_files([*weights, *(path for path in beside if path.is_file())])


def _of_decoder(name: str) -> str:
    folder = Path(name).expanduser()
    return _of_files(sorted(p for p in folder.iterdir() if p.suffix in (SAFE, ".json")))


def _of_files(files: Sequence[Path]) -> str:
    """The digest of a file or, of several, that of their digests."""
    digests = []
    for path in files:
        with path.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else of_bytes("\n".join(digests).encode())
