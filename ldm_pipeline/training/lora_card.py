"""The model card of a LoRA: what it was trained on and how, and how to use it."""

from __future__ import annotations

import yaml

from ldm_pipeline.lora.files import FILE_NAME
from ldm_pipeline.training.config import TrainingConfig

PICTURES = "pictures.png"


def model_card(
    config: TrainingConfig,
    base: str,
    samples: int,
    updates: int,
    pictures: bool,
    tag: str,
    use: str | None = None,
) -> str:
    """The card's Markdown: `samples` pictures taught it in `updates`, `pictures` says whether some
    are shown.

    `tag` is the family of models that it is for, as the hub calls it; `use` how to draw with it,
    where that is not the way of every LoRA.
    """
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    shown = f"![drawn without and with the adapter]({PICTURES})\n\n" if pictures else ""
    return CARD.format(
        base=base, samples=samples, updates=updates, batch=config.run.batch_size,
        shown=shown, config=resolved, tag=tag,
        use=use or USE.format(base=base, name=FILE_NAME),
    )  # fmt: skip


USE = """    ldm generate "…" --model {base} --lora {name}

or, in stock diffusers, `pipeline.load_lora_weights("{name}")`.
"""

CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{tag}, lora, text-to-image, diffusers]
---
# A LoRA for {base}

{shown}Trained on {samples} captioned pictures: {updates} updates of {batch} samples each.

{use}
## Configuration

```yaml
{config}```
"""
