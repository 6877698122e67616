"""What a single file of ours says in its header: the small files of the folder it was made of.

The original layout has no place for configs and tokenizers. A file that `ldm convert` writes
carries them as a note, packed, so that it is a whole model and turns back into the same folder. A
note is a stranger's text like any other: names, size and contents are checked before it is used.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_pipeline.errors import UserError

KEY = "ldm.folder"
LARGEST = 64_000_000
"""Bytes of an unpacked note; CLIP's vocabulary takes a few million."""

KEPT = re.compile(
    r"model_index\.json"
    r"|(unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|scheduler/scheduler_config\.json"
    r"|(tokenizer|tokenizer_2)/[a-z_]+\.(json|txt)"
)
"""The files of a folder that a note keeps."""


@dataclass(frozen=True)
class Note:
    """`files` by their names in the folder, with their texts; `bare` are the text encoders whose
    tensors go without `text_model` there, as newer versions of transformers write them."""

    files: Mapping[str, str]
    bare: tuple[str, ...] = ()

    def config(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`; an empty one where there is none."""
        try:
            contents = json.loads(self.files.get(name, "{}"))
        except (ValueError, RecursionError):
            return {}
        return contents if isinstance(contents, dict) else {}

    def packed(self) -> str:
        """The note as a text for a header."""
        contents = json.dumps({"files": dict(self.files), "bare": self.bare}, sort_keys=True)
        return base64.b64encode(zlib.compress(contents.encode(), 9)).decode()


def read_note(file: object, texts: Mapping[str, str]) -> Note | None:
    """The note among a header's texts, or None; `UserError` for one that cannot be ours."""
    if KEY not in texts:
        return None
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(texts[KEY], validate=True), LARGEST)
        if not unpacker.eof:
            raise ValueError("too long, or cut off")
        contents = json.loads(raw)
        files, bare = contents["files"], tuple(contents["bare"])
        if not all(isinstance(text, str) for text in (*files, *files.values(), *bare)):
            raise ValueError("not texts")
        for name in files:
            if not KEPT.fullmatch(name):
                raise ValueError(f"it names a file {name!r}")
        return Note(files, bare)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise UserError(
            f"the note {KEY} in the header of {file} is none that ldm writes ({error}); take it"
            " out, or take the file from where it was first published"
        ) from None
