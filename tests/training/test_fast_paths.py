"""What the fast ways train is what the plain way trains.

Each test takes one fast way out of a run, or all of them, and compares the adapters after 50 steps:
bit for bit where the arithmetic is the same, else by how far apart they ended, as a share of the
way that they went. `ORDER` is what another order of float32's sums comes to, `STORED` what the
cache adds, which keeps latents in 16 bits, and `HALF` what bfloat16's rounding does, after 50
large steps of Adam, which follows the signs of gradients that are nearly 0.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipeline import LatentDiffusionPipeline
from ldm_pipeline.data import captioned as reading
from ldm_pipeline.lora.files import FILE_NAME, load
from ldm_pipeline.lora.inject import inject
from ldm_pipeline.models import autoencoder
from ldm_pipeline.training import block_attention
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from tests.training.conftest import captioned

STEPS = 50
ORDER, STORED, HALF = 1e-3, 1e-2, 0.1


class Uncached(LoraObjective):
    """The autoencoder and the text encoder speak in every step; nothing they say is kept."""

    def __init__(self, config: LoraConfig, pipe: Any) -> None:
        super().__init__(config, lambda source, dtype: pipe)
        self.vae = pipe.vae
        samples = {sample.key: sample for sample in self.data.every()}
        vae, precision = pipe.vae, config.run.mixed_precision

        class Anew:
            @torch.no_grad()
            def __getitem__(self, key: str) -> dict[str, Tensor]:
                sample = samples[key]
                pixels = sample.transform.picture(reading.load(sample.item).pixels)
                x = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1.0
                with autoencoder.quick(vae, precision):
                    mean, std = autoencoder.encode(vae, x)
                return {"mean": mean[0], "std": std[0]}

        self.latents: Any = Anew()
        self.texts = None


def plain_adamw(trained: Any, settings: Any) -> torch.optim.Optimizer:
    """AdamW one operation at a time, which waits to see that a step is finite."""
    return torch.optim.AdamW(
        trained.values(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )


PLAIN: dict[str, dict[str, Any]] = {
    "layers": {"adapting.inject": partial(inject, fused=False)},
    "input casts": {"adapting.without_input_casts": lambda adapter: nullcontext()},
    "attention": {"adapting.attend_quickly": lambda *told: None},
    "optimiser": {
        "engine.build_optimiser": plain_adamw, "engine.skips_on_the_device": lambda optimiser: False
    },
}  # fmt: skip
"""What stands in for a fast way where it is taken out; "caches" are `Uncached`."""

EVERYTHING = (*PLAIN, "caches")


@pytest.fixture
def trained(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Tensor]]:
    """trained(precision, without=(), steps=50, side=8, **run): the adapter of a run that leaves out
    the fast ways named, on a UNet for latents of that side, with other settings of `run` as
    given."""
    captioned(tmp_path / "pictures", [(64, 64)] * 5)

    def trained(
        precision: str,
        without: Sequence[str] = (),
        steps: int = STEPS,
        side: int = 8,
        **run: Any,
    ) -> dict[str, Tensor]:
        out = tmp_path / f"{precision} {sorted(without)} {steps} {side} {run}"
        values = {
            "run": {
                "out": out, "batch_size": 2, "steps": steps, "workers": 0, "log_with": "none",
                "mixed_precision": precision, **run,
            },
            "optimiser": {"lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
            "data": {"source": str(tmp_path / "pictures"), "resolution": 64, "fixed": True,
                     "cache": tmp_path / "cache"},
            "lora": {"rank": 2},
        }  # fmt: skip
        config = LoraConfig.model_validate(values)
        pipe = LatentDiffusionPipeline(**copy.deepcopy(tiny()))
        pipe.unet.register_to_config(sample_size=side)
        with monkeypatch.context() as patch:
            for name in set(without) - {"caches"}:
                for place, stand_in in PLAIN[name].items():
                    patch.setattr(f"ldm_pipeline.training.{place}", stand_in)
            if "caches" in without:
                objective: LoraObjective = Uncached(config, pipe)
            else:
                objective = LoraObjective(config, lambda source, dtype: pipe)
            return dict(load(fit(objective, config) / FILE_NAME).tensors)

    return trained


def apart(one: dict[str, Tensor], other: dict[str, Tensor], begun: dict[str, Tensor]) -> float:
    """How far apart two adapters ended, as a share of the way that the first went."""

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5

    assert one.keys() == other.keys() == begun.keys()
    went = distance(one, begun)
    assert went > 0.1, "the adapters were trained"
    return distance(one, other) / went


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "without",
    ["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in EVERYTHING)],
)
def test_a_plain_run_ends_where_a_fast_one_does(trained: Any, precision: str, without: str) -> None:
    left_out = EVERYTHING if without == "everything" else (without,)
    share = apart(trained(precision), trained(precision, left_out), trained(precision, steps=1))
    print(f"{precision}, without {without}: {share:.1e}")
    rounding = STORED if "caches" in left_out else ORDER
    assert share <= (HALF if precision == "bf16" else rounding)


def test_attention_in_blocks_ends_where_the_fused_one_does(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on large grids, in several blocks of each head."""
    monkeypatch.setattr(block_attention, "PAIRS", 16 * 64)
    fast, plain = (trained("bf16", without, side=64) for without in ((), ("attention",)))
    share = apart(fast, plain, trained("bf16", steps=1, side=64))
    print(f"attention in blocks: {share:.1e}")
    assert 0 < share <= HALF


def test_batches_prepared_ahead_and_caches_found_change_no_bit(trained: Any) -> None:
    """The second run finds the caches of the first, and its batches come from two processes."""
    first, second = trained("no", steps=10), trained("no", steps=10, workers=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("precision", "tolerance"), [("no", ORDER), ("bf16", HALF)])
def test_a_compiled_run_ends_where_a_fast_one_does(
    trained: Any, precision: str, tolerance: float
) -> None:
    begun, fast = trained(precision, steps=1), trained(precision)
    share = apart(fast, trained(precision, compile=True), begun)
    print(f"{precision}, compiled: {share:.1e}")
    assert share <= tolerance
