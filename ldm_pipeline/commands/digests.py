"""Which files drew a picture: the SHA-256 of each, told in its recipe and compared by `ldm show`.

A path alone does not tell: a training that is run again writes another model or adapter to the same
place. What is published under a fixed name (a hub id, `--lcm`) is told by that; what comes with the
package (`--lcm`, `--decoder small`) by the digest of the bundled model, of which it is a part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm_pipeline.commands.hashing import of_bytes, of_file
from ldm_pipeline.commands.sources import BUNDLED, Source
from ldm_pipeline.lora.files import inspect
from ldm_pipeline.lora.layouts.peft import CONFIG
from ldm_pipeline.metadata import Recipe, quote
from ldm_pipeline.models import bundled, folders
from ldm_pipeline.models.small_decoder import SMALL
from ldm_pipeline.models.trust import SAFE, components


def digests_of(
    source: Source, loras: Sequence[tuple[str, float]], lcm: bool | str, decoder: str | None
) -> dict[str, str]:
    """The digest of every adapter, of the decoder and of a model that is here, by the name it was
    given. Every weight is read, which for a model of gigabytes takes seconds: once (`hashing`)."""
    found = {file: _of_lora(file) for file, _ in loras}
    if isinstance(lcm, str):
        found[lcm] = _of_lora(lcm)
    if decoder is not None and decoder != SMALL:
        found[decoder] = _of_decoder(decoder)
    place = source.folder or source.file
    if place is not None:
        found[source.name] = _of_model(str(place))
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
        now = _of_model if name == recipe.model else now
        place = str(bundled.ASSETS) if name == recipe.model == BUNDLED else name
        said += _compared("drawn with", name, digest, now, place)
    return said


def _compared(
    drawn: str, name: str, digest: str, now: Callable[[str], str], place: str | None = None
) -> list[str]:
    """A line where `name`, which lies at `place`, is not what it was; a forged recipe may name
    anything."""
    shown = f"{quote(name)} (SHA-256 {quote(digest)})"
    place = os.path.expanduser(place or name)
    if not (os.path.isfile(place) or os.path.isdir(place)):  # a device may have no end
        return [f"{drawn} {shown}, which is not here"]
    try:
        same = now(place) == digest
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


def _of_model(name: str) -> str:
    """Of a single file or, of a folder, of all that is opened of it; of the bundled model's, of the
    adapter and the decoder that come with it, too."""
    folder = Path(name).expanduser()
    if folder.is_file():
        return _of_files([folder])
    parts = [folder / part for part in sorted(components(folders.index(folder)))]
    if folder == bundled.ASSETS:
        extra = (bundled.few_step_adapter(), bundled.small_decoder())
        parts += [place for place in extra if place is not None]
    files = [folder / folders.INDEX]
    for part in filter(Path.is_dir, parts):  # that one is missing, its loading tells
        files += sorted(path for path in part.iterdir() if path.suffix in (".json", ".txt"))
        files += folders.weight_files(part)
    return _of_files([path for path in files if path.is_file()])


def _of_files(files: Sequence[Path]) -> str:
    """The digest of a file or, of several, that of their digests, made side by side."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(of_file, files))
    return digests[0] if len(digests) == 1 else of_bytes("\n".join(digests).encode())
