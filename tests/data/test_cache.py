"""The latents' cache: each picture is encoded once, and never read from a shard that is not its."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_pipeline.data import cache

N = 10


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four pictures: ten make three."""
    monkeypatch.setattr(cache, "SHARD", 4)


class Encoder:
    """Tells picture i by the number i, remembers who was asked for, and stops before `stop`."""

    def __init__(self, stop: int = N) -> None:
        self.stop = stop
        self.asked: list[int] = []

    def __call__(self, indices: range) -> tuple[Tensor, Tensor]:
        if indices.stop > self.stop:
            raise KeyboardInterrupt
        self.asked += indices
        mean = torch.tensor(indices).float()[:, None, None, None].expand(-1, 4, 2, 2)
        return mean, mean / 8


def assert_right(answer: tuple[Tensor, Tensor], n: int = N) -> None:
    """The numbers 0 … n - 1 and their eighths, exact in float16."""
    mean, std = answer
    assert mean.dtype == std.dtype == torch.float16
    assert mean.shape == std.shape == (n, 4, 2, 2)
    assert torch.equal(mean[:, 0, 0, 0].float(), torch.arange(n).float())
    assert torch.equal(std, mean / 8)


def test_every_picture_is_encoded_once_in_batches(tmp_path: Path) -> None:
    sizes: list[int] = []
    encoder = Encoder()

    def noted(indices: range) -> tuple[Tensor, Tensor]:
        sizes.append(len(indices))
        return encoder(indices)

    assert_right(cache.latents(tmp_path, N, noted, batch_size=3))
    assert encoder.asked == list(range(N))
    assert sizes == [3, 1, 3, 1, 2]
    again = Encoder(stop=0)
    assert_right(cache.latents(tmp_path, N, again))
    assert again.asked == []


def test_an_interrupted_run_encodes_only_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache.latents(tmp_path, N, Encoder(stop=6), batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["latents-00000000-00000004.safetensors"]
    encoder = Encoder()
    assert_right(cache.latents(tmp_path, N, encoder))
    assert encoder.asked == [4, 5, 6, 7, 8, 9]


def test_a_kill_while_a_shard_is_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.latents(tmp_path, N, Encoder())
    encoder = Encoder()
    assert_right(cache.latents(tmp_path, N, encoder))
    assert encoder.asked == list(range(N))


def test_more_pictures_reuse_whole_shards(tmp_path: Path) -> None:
    """A last shard that was not full is made anew, with its new neighbours."""
    cache.latents(tmp_path, 6, Encoder())
    encoder = Encoder()
    assert_right(cache.latents(tmp_path, N, encoder))
    assert encoder.asked == [4, 5, 6, 7, 8, 9]


def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """Keep the length alone."""
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    """Put the last, shorter shard in its place."""
    path.write_bytes(max(path.parent.iterdir()).read_bytes())


@pytest.mark.parametrize("damage", [cut, zero, swap, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_shard_is_made_again_alone(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache.latents(tmp_path, N, Encoder())
    damage(tmp_path / "latents-00000004-00000008.safetensors")
    encoder = Encoder()
    assert_right(cache.latents(tmp_path, N, encoder))
    assert encoder.asked == [4, 5, 6, 7]
    assert_right(cache.latents(tmp_path, N, Encoder(stop=0)))


def test_the_key_changes_with_all_that_decides_the_latents() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    keys = [
        cache.key_of(weights, 0.18, "no", "world", 0),
        cache.key_of({**weights, "b": torch.tensor([3.0000002])}, 0.18, "no", "world", 0),
        cache.key_of({"a": weights["a"], "c": weights["b"]}, 0.18, "no", "world", 0),
        cache.key_of(weights, 0.19, "no", "world", 0),
        cache.key_of(weights, 0.18, "bf16", "world", 0),
        cache.key_of(weights, 0.18, "no", "world", 1),
    ]
    assert len(set(keys)) == len(keys)
    backwards = dict(reversed(weights.items()))
    assert cache.key_of(backwards, 0.18, "no", "world", 0) == keys[0]
