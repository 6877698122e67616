"""Single files of the hub's models: from its cache on this machine, or from the hub itself unless
HF_HUB_OFFLINE forbids it. Nothing heavy is imported for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import folders
from ldm_pipeline.models.trust import SAFE

LINK = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)/"
    r"(?:(?:blob|resolve)/(?P<revision>[^/?#]+)/)?(?P<file>[^?#]+\.safetensors)(?:\?download=true)?"
)
"""How a browser names a file of the hub, and shorter forms that stock takes."""


def fetched(hub_id: str, name: str, *, alone: bool = False, **told: Any) -> Path:
    """The file `name` of a hub model on this machine; `told` is what `hf_hub_download` takes.

    Where it cannot be had, that is told of the file if it is wanted `alone`, else of the model.
    """
    from huggingface_hub import hf_hub_download

    with reaching(hub_id, bool(told.get("local_files_only")), name if alone else None):
        return Path(hf_hub_download(hub_id, name, **told))


def cached(hub_id: str) -> Path | None:
    """The snapshot of a hub model that is in its cache on this machine, the one that is opened
    where none is named; None without."""
    from huggingface_hub import try_to_load_from_cache

    with reaching(hub_id, local=True):
        found = try_to_load_from_cache(hub_id, folders.INDEX)
    return Path(found).parent if isinstance(found, str) else None


def offline() -> bool:
    """Whether the hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetched_index(hub_id: str, **told: Any) -> dict[str, Any]:
    """The `model_index.json` of a hub model, checked, before anything else of it is fetched."""
    if hub_id.endswith(SAFE):
        raise UserError(f"there is no file {hub_id}")
    return folders.index(fetched(hub_id, folders.INDEX, **told).parent)


def fetched_file(link: str, **told: Any) -> Path:
    """The safetensors file of a hub model that a link names, on this machine; `told` is what
    `hf_hub_download` takes. Raises `UserError` for other names and for links to elsewhere."""
    named = LINK.fullmatch(link)
    revision, name = ("", "") if named is None else map(unquote, named.groups("")[1:])
    if named is None or ".." in re.split(r"[/\\]", f"{revision}/{name}"):
        raise UserError(
            f"there is no file {link}; name a .safetensors file on this machine, or one of the hub"
            " by its link (https://huggingface.co/owner/name/blob/main/file.safetensors); a hub id"
            " is opened with from_pretrained"
        )
    asked = told.pop("revision", None) or revision or None
    return fetched(named["id"], name, alone=True, revision=asked, **told)


@contextmanager
def reaching(hub_id: str, local: bool, file: str | None = None) -> Iterator[None]:
    """Within the block, what the hub cannot give ends in one line: a model, or a `file` of it."""
    try:
        yield
    except (OSError, ValueError) as error:
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

        root = error.__cause__ or error
        alone = local or isinstance(root, OfflineModeIsEnabled) or offline()
        why = str(root).strip().partition("\n")[0]
        if alone and not isinstance(root, HFValidationError):
            why = "offline, and not in the cache"
        if file is not None:
            raise UserError(
                f"{file} of {hub_id} could not be fetched from the hub ({why}); name a"
                " .safetensors file on this machine"
            ) from error
        raise UserError(
            f"there is no model folder {hub_id}, and as a hub id it could not be fetched ({why}); "
            "name a folder in Diffusers layout, a .safetensors file, or a model of the hub as"
            " owner/name"
        ) from error
