"""Picture files: PNG, WebP and JPEG, each with the recipe that drew it and what other tools read.

               pixels                    the recipe, as JSON       the settings, for other tools
    .png       as drawn                  chunk `ldm`               chunk `parameters`
    .webp      as drawn, in fewer bytes  EXIF MakerNote            EXIF UserComment
    .jpg       nearly, in the fewest     EXIF MakerNote            EXIF UserComment

The settings stand where AUTOMATIC1111's web interface writes them, in its form. A file holds
nothing that changes from run to run: the same picture and recipe are the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.metadata import Recipe
from ldm_pipeline.replacing import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Pillow's name of the format that each ending of a file's name asks for."""

ENDINGS = ", ".join(FORMATS)

CHUNK = "ldm"
"""The PNG chunk that holds the recipe as JSON."""

SETTINGS = "parameters"
"""The PNG chunk that other tools read."""

QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 95, "subsampling": 0},
}

LONGEST_SIDE = {"WEBP": 16_383, "JPEG": 65_500}
"""Pixels that a format can hold in one direction."""

LONGEST_EXIF = 65_000
"""Bytes; a JPEG's segment holds 65,533, some of which are names and lengths."""

_EXIF_FOLDER, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286
_MINE, _UNICODE = b"ldm\0", b"UNICODE\0"


def format_of(path: Path) -> str:
    """The format that the name of `path` asks for; `UserError` for none of the three."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise UserError(f"cannot write {path}: give it a name that ends in {ENDINGS}") from None


def check_fits(path: Path, recipe: Recipe, height: int = 0) -> None:
    """Raise `UserError` where the file at `path` cannot hold so long a recipe, or so many pixels
    in height."""
    kind = format_of(path)
    if height > LONGEST_SIDE.get(kind, height):
        raise UserError(
            f"cannot write {path}: so many pictures make a grid of {height} pixels in height, and"
            f" a {kind} holds {LONGEST_SIDE[kind]}; give it a name that ends in .png"
        )
    if kind == "JPEG" and len(_note(recipe)) + len(_comment(recipe)) > LONGEST_EXIF:
        raise UserError(
            f"cannot write {path}: the prompts are too long for what a JPEG holds besides its"
            " pixels; give it a name that ends in .png or .webp"
        )


def save_picture(picture: Image, path: Path, recipe: Recipe) -> None:
    """Write `picture` with its recipe to `path`, complete or not at all.

    Raises `UserError` where the folder cannot be written, or the format cannot hold it.
    """
    kind = format_of(path)
    told = {**QUALITY[kind], **(_chunks(recipe) if kind == "PNG" else _exif(recipe))}
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            picture.save(file, format=kind, **told)
    except UserError:
        raise
    except ValueError as error:  # a side or a text too long for the format
        raise UserError(f"cannot write {path}: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """The recipe inside the picture at `path`; `UserError` where there is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one picture in it")
    if not path.is_file():
        raise UserError(f"no such picture: {path}")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            text = _recipe_text(picture)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read {path}: not a picture") from error
    except Exception as error:  # a damaged file can break Pillow's readers in any way
        raise UserError(f"cannot read {path}: {error}") from error
    if text is None:
        raise UserError(f"{path} carries no settings: not drawn by ldm, or saved again by a tool")
    try:
        return Recipe.from_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the settings inside {path} cannot be read: {error}") from error


def is_whole(path: Path) -> bool:
    """Whether there is a picture at `path`, to its last pixel."""
    if not path.is_file():
        return False
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception:  # as above
        return False
    return True


def _recipe_text(picture: Image) -> str | None:
    """The recipe as JSON, from the place where the picture's format keeps it."""
    if picture.format == "PNG":
        text = picture.info.get(CHUNK)
        return text if isinstance(text, str) else None
    note = picture.getexif().get_ifd(_EXIF_FOLDER).get(_MAKER_NOTE)
    if not isinstance(note, bytes) or not note.startswith(_MINE):
        return None
    return note.removeprefix(_MINE).decode("utf-8")


def _chunks(recipe: Recipe) -> dict[str, Any]:
    """What a PNG is saved with."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt(CHUNK, recipe.to_json())
    settings = _settings(recipe)
    # The plain chunk is the one that every reader knows, but it has no agreed letters beyond ASCII.
    add = chunks.add_text if settings.isascii() else chunks.add_itxt
    add(SETTINGS, settings)
    return {"pnginfo": chunks}


def _exif(recipe: Recipe) -> dict[str, Any]:
    """What a WebP or JPEG is saved with."""
    from PIL.Image import Exif

    exif = Exif()
    exif[_EXIF_FOLDER] = {_MAKER_NOTE: _note(recipe), _USER_COMMENT: _comment(recipe)}
    return {"exif": exif.tobytes()}


def _note(recipe: Recipe) -> bytes:
    return _MINE + recipe.to_json().encode("utf-8")


def _comment(recipe: Recipe) -> bytes:
    return _UNICODE + _settings(recipe).encode("utf-16-be")


def _settings(recipe: Recipe) -> str:
    """The settings; what is no text (half a character, as a terminal may pass) becomes ?."""
    return recipe.settings().encode("utf-8", "replace").decode("utf-8")
