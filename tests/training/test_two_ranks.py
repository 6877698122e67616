"""What two processes of a run owe each other: one end for both, few words, the same bits."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from ldm_pipeline.errors import UserError
from ldm_pipeline.models import autoencoder
from ldm_pipeline.processes.ranks import LostPeer, Ranks
from ldm_pipeline.training import checkpoint
from ldm_pipeline.training.captioned import Captioned, CaptionedSettings
from ldm_pipeline.training.config import TrainingConfig
from ldm_pipeline.training.engine import fit
from ldm_pipeline.training.launch import launch
from ldm_pipeline.training.lora import LoraConfig, LoraObjective
from ldm_pipeline.training.objective import Batch
from ldm_pipeline.training.shares import one_on_each_machine_first, share_of
from ldm_pipeline.training.steps import Steps
from tests.ranks import two_ranks
from tests.training.conftest import captioned
from tests.training.test_streaming import table as table
from tests.training.tiny_lora import open_model
from tests.training.toy import Toy, settings

Config = TrainingConfig


def weights(out: Path) -> dict[str, dict[str, Tensor]]:
    """The parts of a run's newest checkpoint."""
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)[0]


def assert_same(one: Path, other: Path) -> None:
    """Two runs' newest checkpoints are the same, bit for bit."""
    parts, others = weights(one), weights(other)
    assert parts.keys() == others.keys()
    for part, tensors in parts.items():
        assert tensors.keys() == others[part].keys()
        assert [n for n, value in tensors.items() if not torch.equal(value, others[part][n])] == []


def launched(folder: Path, told: list[str], config: Any, build: Callable[[Any], nn.Module]) -> Any:
    """What `two_ranks` says of a training script with this command line."""

    def work(rank: int) -> None:
        sys.argv = ["toy", f"--run.out={folder / 'out'}", "--run.workers=0", *told]
        launch(config, build)

    return two_ranks(folder, work)


# -- errors ----------------------------------------------------------------------------------


def lora(folder: Path, pictures: Path, *told: str) -> Any:
    """Two processes that train a tiny LoRA for two steps."""
    data = [f"--data.source={pictures}", f"--data.cache={folder / 'cache'}", "--data.resolution=64"]
    run = ["--run.steps=2", "--run.batch_size=2", "--run.mixed_precision=no", "--lora.rank=2"]
    build = partial(LoraObjective, open_model=open_model)
    return launched(folder, [*data, *run, *told], LoraConfig, build)


def in_one_line(said: str) -> str:
    """The one error among a process's lines."""
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def test_a_bad_picture_that_one_process_finds_ends_both_in_one_line(tmp_path: Path) -> None:
    pictures = captioned(tmp_path / "pictures", [(64, 64)] * 4)
    bad = pictures / "1.png"
    bad.write_bytes(bad.read_bytes()[:2000])  # its header is whole: only decoding finds it
    codes, said = lora(tmp_path, pictures, "--data.strict=true")
    assert codes == [2, 2]
    for text in said:
        assert f"error: {bad}: truncated or damaged" in in_one_line(text)


def test_memory_that_one_process_lacks_while_it_encodes_ends_both_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = autoencoder.encode

    def full(vae: Any, x: Tensor) -> Any:
        if os.environ.get("RANK") == "1":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 TB")
        return encode(vae, x)

    monkeypatch.setattr(autoencoder, "encode", full)
    codes, said = lora(tmp_path, captioned(tmp_path / "pictures", [(64, 64)] * 4))
    assert codes == [2, 2]
    for text in said:
        assert in_one_line(text).startswith("error: out of memory while pictures were encoded")


class Killed(Toy):
    """A toy whose second process is killed while it makes its batch of step 3."""

    def __init__(self, config: Config) -> None:
        share = config.run.batch_size // 2

        def kill(positions: range) -> None:
            if positions.start == 3 * config.run.batch_size + share:
                os.kill(os.getpid(), signal.SIGKILL)

        super().__init__(config, kill)


def test_a_killed_process_ends_the_other_in_one_line_and_both_go_on_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    told = ["--run.steps=6", "--run.batch_size=12", "--run.accumulation=3", "--run.save_every=2",
            "--optimiser.lr=0.01", "--run.mixed_precision=no"]  # fmt: skip
    codes, said = launched(tmp_path / "broken", told, Config, Killed)
    assert codes == [1, -signal.SIGKILL]
    assert in_one_line(said[0]).startswith("error: another process of this run ended;")
    newest = checkpoint.newest(tmp_path / "broken" / "out" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000002"
    for name in ("broken", "whole"):
        codes, said = launched(tmp_path / name, told, Config, Toy)
        assert codes == [0, 0], said
    assert_same(tmp_path / "broken" / "out", tmp_path / "whole" / "out")


def test_an_error_of_one_is_raised_by_all_and_told_before_the_next_word(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        ranks = Ranks(PartialState(cpu=True))
        share = share_of(ranks)

        def fail(who: int, error: Exception) -> None:
            with share.alike():
                if rank == who:
                    raise error

        for who, kind in enumerate((UserError, OSError)):
            with pytest.raises(kind, match=f"^error of {who}$"):
                fail(who, kind(f"error of {who}"))
        with share.alike():
            pass
        assert ranks.told(str(rank)) == ["0", "1"]

    codes, said = two_ranks(tmp_path, work)
    assert codes == [0, 0], said


def test_one_process_works_first_however_long_and_the_others_find_it(tmp_path: Path) -> None:
    """Longer than collectives wait that expect nobody to have work of its own."""

    def work(rank: int) -> None:
        state = PartialState(cpu=True, timeout=timedelta(seconds=1))
        place = tmp_path / "copied"

        def copy() -> bool:
            if rank == 0:
                time.sleep(2.5)
                place.write_text("whole")
            return place.exists()

        assert one_on_each_machine_first(copy)
        ranks = Ranks(state)
        if rank == 0:
            time.sleep(2.5)
        ranks.wait()
        if rank == 0:
            time.sleep(2.5)
        else:
            with pytest.raises(LostPeer):
                ranks.agree(True)

    codes, said = two_ranks(tmp_path, work)
    assert codes == [0, 0], said


def test_of_two_processes_one_copies_a_table(table: Path, tmp_path: Path) -> None:
    codes, said = lora(tmp_path, table, "--data.stream=true")
    assert codes == [0, 0], said
    assert ["copying the rows of" in text for text in said] == [True, False]
    (copy,) = (tmp_path / "cache" / "rows").iterdir()
    assert [path.name for path in copy.iterdir()] == ["rows-00000.tar"]


# -- steps -----------------------------------------------------------------------------------


class Full(Toy):
    """A toy whose second process holds two samples in training and no more."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The toy's losses."""
        if self.training and os.environ["RANK"] == "1" and len(batch["x"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return super().forward(batch)


def test_memory_that_one_process_lacks_halves_the_pieces_of_both(tmp_path: Path) -> None:
    """The same bits as asked for so at once."""
    for name, build, accumulation in (("found", Full, 1), ("asked", Toy, 4)):
        config = settings(tmp_path / name, batch_size=16, accumulation=accumulation)
        work = partial(lambda build, config, rank: fit(build(config), config), build, config)
        codes, said = two_ranks(tmp_path / name, work)
        assert codes == [0, 0], said
        newest = checkpoint.newest(tmp_path / name / "checkpoints")
        assert newest is not None
        assert checkpoint.load(newest)[1]["pieces"] == 4
    assert_same(tmp_path / "found", tmp_path / "asked")


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce")


def test_a_step_costs_two_collectives_however_many_pieces_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word on the host and one sum of gradients."""
    seen: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **told: Any) -> Any:
            seen[name] += 1
            return original(*args, **told)

        return call

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, counted(name))
    config = settings(tmp_path, steps=5, batch_size=12, accumulation=3, validate_every=100)

    def work(rank: int) -> None:
        at: dict[int, Counter[str]] = {}

        def note(positions: range) -> None:
            at.setdefault(positions.start // 12, seen.copy())

        fit(Toy(config, note), config)
        assert [at[step + 1] - at[step] for step in range(4)] == [Counter(all_reduce=2)] * 4

    codes, said = two_ranks(tmp_path, work)
    assert codes == [0, 0], said


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_epoch_has_each_sample_once_over_all_processes(
    tmp_path: Path, accumulation: int
) -> None:
    class Rank:
        """One of two processes."""

        count = 2

        def __init__(self, index: int) -> None:
            self.index = index

    pictures = captioned(tmp_path / "pictures", [(64, 64), (96, 32)] * 12)
    data = Captioned(
        CaptionedSettings.model_validate(
            {"source": str(pictures), "resolution": 64, "bucket_step": 32}
        ),
        0,
        6,
    )
    ranks: list[Any] = [Rank(0), Rank(1)]
    toy = Toy(settings(tmp_path))
    every = [Steps(toy, 6, rank, accumulation) for rank in ranks]
    for epoch in range(2):
        positions = [
            position
            for step in range(epoch * 4, epoch * 4 + 4)
            for steps in every
            for piece in steps.positions(step)
            for position in piece
        ]
        assert sorted(positions) == list(range(epoch * 24, epoch * 24 + 24))
        assert len({data.sample(position).item.key for position in positions}) == 24
