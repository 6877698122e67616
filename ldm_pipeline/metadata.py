"""What a picture file remembers: the recipe that drew it.

A `Recipe` is everything that decides the pixels. It travels in the file (see `picture_files`) as
JSON, and as the settings that other picture tools read. `Recipe.command` turns it back into the
shell command that draws the same file again, byte for byte; for that it holds nothing that changes
from run to run: no time, no file name, no machine.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from ldm_pipeline.memory import PLAIN, Memory

FORMAT = 1
"""The version of that JSON; a reader refuses a later one."""

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "lcm": "LCM",
    "pndm": "PLMS",
    "unipc": "UniPC",
    "deis": "DEIS",
    "kdpm2": "DPM2",
    "kdpm2_a": "DPM2 a",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "tcd": "TCD",
}
"""What other picture tools call our samplers."""

LATER = ("loras", "lcm", "eta", "decoder", "weighted", "origin", "digests")
"""What older pictures' recipes do not hold."""

RECORDED_PACKAGES = ("ldm-pipeline", "torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Origin:
    """The picture that one was drawn out of, or into, and how.

    `image` and `mask` are file names as they were given, each with the SHA-256 of the file.
    `strength` is None as long as nobody named one and the model is not known. With `keep` the
    pixels outside the mask are the picture's own. `crop` is the margin around the mask of the part
    that was drawn. `grow` holds the pixels painted on at the left, top, right and
    bottom. `height` and `width` are the sizes that were asked for; without them the picture's own
    decides.
    """

    image: tuple[str, str]
    mask: tuple[str, str] | None = None
    strength: float | None = None
    exact_steps: bool = False
    keep: bool = True
    crop: int | None = None
    grow: tuple[int, int, int, int] = (0, 0, 0, 0)
    height: int | None = None
    width: int | None = None

    def words(self) -> list[str]:
        """The arguments of `ldm generate` that ask for this."""
        words = [f"--image={self.image[0]}"]
        words += ["--strength", repr(self.strength)] if self.strength is not None else []
        if self.mask is not None:
            words += [f"--mask={self.mask[0]}"]
        words += ["--height", str(self.height)] if self.height is not None else []
        words += ["--width", str(self.width)] if self.width is not None else []
        words += ["--exact-steps"] if self.exact_steps else []
        words += ["--crop", str(self.crop)] if self.crop is not None else []
        words += ["--grow", ",".join(map(str, self.grow))] if any(self.grow) else []
        return words + ([] if self.keep else ["--no-keep"])

    @staticmethod
    def of(values: Mapping[str, Any]) -> Origin:
        """The inverse of `asdict`; ValueError or TypeError where a value is of another type."""
        image, mask = values["image"], values["mask"]
        named = [*image, *(mask or ())]
        asked = {name: values[name] for name in ("crop", "height", "width")}
        whole = [*values["grow"], *(value for value in asked.values() if value is not None)]
        if not all(isinstance(text, str) for text in named) or len(named) not in (2, 4):
            raise ValueError("the name of a picture is missing")
        if not all(type(number) is int for number in whole) or len(values["grow"]) != 4:
            raise ValueError("a whole number is missing")
        left, top, right, bottom = values["grow"]
        return Origin(
            image=(image[0], image[1]),
            mask=None if mask is None else (mask[0], mask[1]),
            strength=None if values["strength"] is None else float(values["strength"]),
            exact_steps=bool(values["exact_steps"]),
            keep=bool(values["keep"]),
            grow=(left, top, right, bottom),
            **asked,
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture file drawn by `ldm generate`.

    `prompts` holds one prompt, or, for a grid, one for each of its captions; `n` is the number of
    pictures for each prompt. Picture k of a run uses seed `seed + k`. `sampler` None is the
    model's own. `size` is (height, width) in pixels. `loras` are adapter files with their
    weights; `lcm` is that of few steps, "" the one known for the model. `eta` is the share of fresh
    noise, None the sampler's own, and `decoder` the small autoencoder, as --decoder names it.
    `weighted` says that prompts were read with weights and BREAK, which older pictures' were not.
    `origin` is the picture that it was drawn out of, which then says how its size came about.
    `memory` is what of it is `Memory.seen`; older pictures were drawn plainly. `digests` has the
    SHA-256 of the model, each adapter and decoder, by its name here: another may lie there later.
    `versions` names the packages that drew it: other versions may round differently. Neither
    enters the command.
    """

    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    device: str
    dtype: str
    model: str = "bundled"
    sampler: str | None = None
    eta: float | None = None
    decoder: str | None = None
    negative: str | None = None
    n: int = 1
    grid: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    lcm: str | None = None
    weighted: bool = False
    origin: Origin | None = None
    memory: Memory = PLAIN
    digests: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def command(self, output: str) -> str:
        """The shell command, one line, that draws this file again and writes it to `output`."""
        words = ["ldm", "generate", "-o", output, "--model", self.model]
        words += [f"--lora={file}:{weight!r}" for file, weight in self.loras]
        if self.lcm is not None:
            words += [f"--lcm={self.lcm}" if self.lcm else "--lcm"]
        words += ["--seed", str(self.seed), "--steps", str(self.steps)]
        words += ["--guidance", repr(self.guidance)]
        if self.sampler is not None:
            words += ["--sampler", self.sampler]
        words += ["--eta", repr(self.eta)] if self.eta is not None else []
        words += [f"--decoder={self.decoder}"] if self.decoder is not None else []
        if self.negative is not None:
            words += [f"--negative={self.negative}"]
        if self.origin is not None:
            words += self.origin.words()
        else:
            words += ["--height", str(self.size[0]), "--width", str(self.size[1])]
        words += ["--device", self.device, "--dtype", self.dtype]
        if self.memory.attention != PLAIN.attention or self.device != "cpu":
            words += ["--attention", self.memory.attention]  # on a GPU, auto may be another one
        words += self.memory.words()
        if self.n != 1:
            words += ["--n", str(self.n)]
        if self.grid:
            words += ["--grid"]
        if not self.weighted:
            words += ["--plain"]
        if any(prompt.startswith("-") for prompt in self.prompts):
            words += ["--"]
        return " ".join(map(quote, [*words, *self.prompts]))

    def to_json(self) -> str:
        """The recipe as JSON, the same text for the same recipe.

        What `LATER` names is left out where there is none: so it was before there were any.
        """
        values = asdict(self)
        for name in LATER:
            if values[name] is None or values[name] is False or values[name] in ((), {}):
                del values[name]
        if self.memory == PLAIN:
            del values["memory"]
        return json.dumps({"format": FORMAT, **values}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The inverse of `to_json`; ValueError for text that is no recipe of this format."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError("written by another version of ldm")
        known = {entry.name for entry in fields(Recipe)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown}")
        return _checked(values)

    def settings(self) -> str:
        """The recipe in the form of AUTOMATIC1111's web interface: the prompt, the negative
        prompt and a line of `name: value`, with quotes where a value holds a comma or colon."""
        lines = [" | ".join(self.prompts)]
        if self.negative:
            lines += [f"Negative prompt: {self.negative}"]
        own = self.sampler and SAMPLERS.get(self.sampler, self.sampler)
        loras = [f"{_name(file)}:{_shortest(weight)}" for file, weight in self.loras]
        loras += [f"{_name(self.lcm)}:1"] if self.lcm else []
        strength = self.origin.strength if self.origin else None
        values = {
            "Steps": str(self.steps),
            "Sampler": own or ("model default" if self.lcm is None else "LCM"),
            "CFG scale": _shortest(self.guidance),
            "Seed": str(self.seed),
            "Size": f"{self.size[1]}x{self.size[0]}",
            "Model": _name(self.model),
            "VAE": _name(self.decoder) if self.decoder else "",
            "Eta": "" if self.eta is None else _shortest(self.eta),
            "LoRA": ", ".join(loras),
            "Denoising strength": _shortest(strength) if strength is not None else "",
        }
        told = [f"{name}: {_quoted(value)}" for name, value in values.items() if value]
        return "\n".join([*lines, ", ".join(told)])


def _name(place: str) -> str:
    """How other tools call the model or adapter at `place`: its file or folder, no ending."""
    last = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    return last.removesuffix(".safetensors") or place


def _shortest(number: float) -> str:
    """`number` in as few digits as stand for it exactly."""
    brief = f"{number:g}"
    return brief if float(brief) == number else repr(number)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _checked(values: dict[str, Any]) -> Recipe:
    """A recipe from parsed JSON, every field of the type that it claims (files can be forged)."""
    loras = tuple((file, float(weight)) for file, weight in values.get("loras", ()))
    texts = [values["model"], values["device"], values["dtype"], *values["prompts"]]
    texts += [file for file, _ in loras]
    texts += [values[name] for name in ("sampler", "negative") if values[name] is not None]
    texts += [values[name] for name in ("lcm", "decoder") if values.get(name) is not None]
    eta = values.get("eta")
    whole = [values["seed"], values["steps"], values["n"], *values["size"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is missing")
    if not all(type(number) is int for number in whole) or len(values["size"]) != 2:
        raise ValueError("a whole number is missing")
    height, width = values["size"]
    return Recipe(
        **{
            **values,
            "prompts": tuple(values["prompts"]),
            "guidance": float(values["guidance"]),
            "eta": None if eta is None else float(eta),
            "size": (height, width),
            "grid": bool(values["grid"]),
            "loras": loras,
            "weighted": bool(values.get("weighted", False)),
            "origin": Origin.of(values["origin"]) if values.get("origin") is not None else None,
            "memory": Memory.of(values["memory"]) if "memory" in values else PLAIN,
            "digests": {str(k): str(v) for k, v in dict(values.get("digests", {})).items()},
            "versions": {str(k): str(v) for k, v in dict(values["versions"]).items()},
        }
    )


def quote(word: str) -> str:
    """`word` for a POSIX shell; control characters as $'\\x1b', so that none reaches a terminal."""
    hidden = [c for c in word if not c.isprintable() and c not in "\n\t"]
    if not hidden:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    for character in set(hidden):
        code = "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
        escaped = escaped.replace(character, code)
    return f"$'{escaped}'"


def installed_versions(packages: Sequence[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """The installed version of each of `packages`, read without importing any of them."""
    return {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
