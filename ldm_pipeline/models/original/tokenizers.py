"""CLIP's vocabulary, which single files do not hold and this package does not bring.

It is looked for where it may lie on this machine, and nothing is asked of the network: in a folder
that is named, beside the file, in the hub's cache (CLIP itself, or any model with it), and in an
installed open_clip, whose file is read and whose code is not imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from ldm_pipeline.errors import UserError

Files = dict[str, str]

END, START = "<|endoftext|>", "<|startoftext|>"
_OPEN_CLIP = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48_894
"""Of the pairs in that file CLIP uses the first so many."""


def vocabulary(file: Path, size: int, folder: Path | None = None) -> Files:
    """The files of a tokenizer with `size` words, for the model in `file`, by name.

    `folder` is looked into first, and alone where it is given. Raises `UserError` where there is
    none.
    """
    inside = [folder, folder / "tokenizer", folder / "tokenizer_2"] if folder else []
    for place in inside or _places(file):
        if (files := _read(place)) and _count(files) == size:
            return files
    if folder is not None:
        raise UserError(f"{folder} holds no tokenizer of {size} words, which {file} needs")
    if (files := _of_open_clip()) and _count(files) == size:
        return files
    raise UserError(
        f"{file} needs CLIP's tokenizer ({size} words), which is not on this machine: put it beside"
        " the file, as a folder called tokenizer; or name a folder that has it, such as a Stable"
        " Diffusion model in Diffusers layout (ldm convert --tokenizer FOLDER, load(tokenizer=…),"
        " from_single_file(config=…));"
        " or once, online: hf download openai/clip-vit-large-patch14 vocab.json merges.txt, or"
        " pip install --no-deps open_clip_torch"
    )


def settings(pad: str) -> str:
    """The contents of a `tokenizer_config.json` for CLIP that pads with `pad`."""
    told = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    return json.dumps(told, indent=2) + "\n"


def _places(file: Path) -> Iterator[Path]:
    """Folders that may hold CLIP's vocabulary."""
    yield file.parent / "tokenizer"
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    yield from sorted(cache.glob("models--openai--clip-vit-large-patch14/snapshots/*"))
    yield from sorted(cache.glob("models--*/snapshots/*/tokenizer"))


def _read(place: Path) -> Files | None:
    """The vocabulary's files in a folder, or None."""
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        if all((place / name).is_file() for name in names):
            try:
                return {name: (place / name).read_text(encoding="utf-8") for name in names}
            except (OSError, UnicodeDecodeError):
                return None
    return None


def _count(files: Files) -> int:
    """How many words a vocabulary has; 0 where that cannot be told."""
    try:
        if "vocab.json" in files:
            return len(json.loads(files["vocab.json"]))
        return len(json.loads(files["tokenizer.json"])["model"]["vocab"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def _of_open_clip() -> Files | None:
    """The vocabulary from the file that the open_clip package brings, or None.

    Words are the 256 bytes, the same at a word's end, the merged pairs, and start and end.
    """
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    try:
        with gzip.open(Path(found.origin).parent / _OPEN_CLIP, "rt", encoding="utf-8") as lines:
            merges = lines.read().split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    letters = _letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(pair.split()) for pair in merges] + [START, END]
    vocab = {word: i for i, word in enumerate(words)}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def _letters() -> list[str]:
    """A visible letter for each byte, in CLIP's order: first those that stand for themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) for byte in own] + [chr(256 + i) for i in range(len(others))]
