"""Many pictures as one: a grid with a caption under each picture.

Legend: a *cell* is one picture with its caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

SMALLEST_CELL = 224
"""Pixels; smaller pictures are enlarged by a whole factor, so that captions find room."""

MARGIN = 10
FONT_SIZE = 14
LINE = 18
PAPER, INK = (255, 255, 255), (34, 34, 34)


def columns_for(prompts: int, n: int) -> int:
    """Columns of a grid of `n` pictures of each prompt: a row for each prompt where there are
    several of both, else the smallest number that makes it at least as wide as high in cells."""
    return n if prompts > 1 and n > 1 else math.ceil(math.sqrt(prompts * n))


def least_height(prompts: int, n: int) -> int:
    """Pixels that such a grid is high at least, whatever its pictures' size."""
    return math.ceil(prompts * n / columns_for(prompts, n)) * SMALLEST_CELL


def captioned_grid(
    pictures: Sequence[Image], captions: Sequence[str], columns: int | None = None
) -> Image:
    """One RGB picture showing `pictures` row by row, each above its caption.

    `columns` defaults to those for one picture of each prompt. All pictures must have the size of
    the first. The same input gives the same pixels.
    """
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    assert pictures, "a grid needs at least one picture"
    assert len(pictures) == len(captions), "one caption for each picture"
    columns = columns or columns_for(len(pictures), 1)
    rows = math.ceil(len(pictures) / columns)
    factor = math.ceil(SMALLEST_CELL / pictures[0].width)
    width, height = pictures[0].width * factor, pictures[0].height * factor

    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, width) for caption in captions]
    heights = [
        height + LINE * max(len(text) for text in texts[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    sheet = Images.new(
        "RGB",
        (MARGIN + columns * (width + MARGIN), MARGIN + sum(heights) + rows * MARGIN),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(index, columns)
        left = MARGIN + column * (width + MARGIN)
        top = MARGIN + sum(heights[:row]) + row * MARGIN
        enlarged = picture.convert("RGB").resize((width, height), Images.Resampling.LANCZOS)
        sheet.paste(enlarged, (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + 1 + number * LINE), line, fill=INK, font=font)
    return sheet


def wrap(text: str, font: FreeTypeFont | ImageFont, width: int, lines: int = 4) -> list[str]:
    """`text` broken at spaces into at most `lines` lines of `width` pixels; … marks a cut."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if font.getlength(longer) <= width or not broken[-1]:
            broken[-1] = longer
        else:
            broken.append(word)
    kept = [_fit(line, font, width) for line in broken[:lines]]
    if len(broken) > lines:
        kept[-1] = _fit(broken[lines - 1] + " …", font, width)
    return kept


def _fit(line: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """`line`, with its end replaced by … where it is wider than `width` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
