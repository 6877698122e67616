"""Single files of the hub's models: from its cache on this machine, or from the hub itself unless
HF_HUB_OFFLINE forbids it. Nothing heavy is imported for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import folders


def fetched(hub_id: str, name: str, **told: Any) -> Path:
    """The file `name` of a hub model on this machine; `told` is what `hf_hub_download` takes."""
    from huggingface_hub import hf_hub_download

    with reaching(hub_id, bool(told.get("local_files_only"))):
        return Path(hf_hub_download(hub_id, name, **told))


def fetched_index(hub_id: str, **told: Any) -> dict[str, Any]:
    """The `model_index.json` of a hub model, checked, before anything else of it is fetched."""
    return folders.index(fetched(hub_id, folders.INDEX, **told).parent)


@contextmanager
def reaching(hub_id: str, local: bool) -> Iterator[None]:
    """Within the block, what the hub cannot give ends in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import OfflineModeIsEnabled

        root = error.__cause__ or error
        offline = local or isinstance(root, OfflineModeIsEnabled) or HF_HUB_OFFLINE
        why = "offline, and not in the cache" if offline else str(root).strip().partition("\n")[0]
        raise UserError(
            f"there is no model folder {hub_id}, and as a hub id it could not be fetched ({why}); "
            "name a folder in Diffusers layout, a .safetensors file, or a model of the hub as"
            " owner/name"
        ) from error
