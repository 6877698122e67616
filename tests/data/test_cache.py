"""The cache of what encoders said: once each, whole or not at all, damage named and made again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ldm_pipeline.data import cache
from ldm_pipeline.data.cache import ALONE, Cache, Entry, Share, fill
from ldm_pipeline.data.writing import NotWritten
from ldm_pipeline.errors import UserError
from tests.shares import together

KEYS = [f"picture-{i}" for i in range(10)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four entries: ten make three."""
    monkeypatch.setattr(cache, "MOST_ENTRIES", 4)


class Encoder:
    """Tells entry i by the number i in a shape of its own, remembers who was asked for, has none
    for those in `bad`, and is interrupted before `stop`."""

    def __init__(self, stop: int = len(KEYS), bad: Sequence[int] = ()) -> None:
        self.stop, self.bad = stop, bad
        self.asked: list[int] = []
        self.sizes: list[int] = []

    def __call__(self, indices: Sequence[int]) -> list[Entry | None]:
        if max(indices) >= self.stop:
            raise KeyboardInterrupt
        self.asked += indices
        self.sizes.append(len(indices))
        return [None if i in self.bad else right(i) for i in indices]


def right(i: int) -> Entry:
    """What the encoder says to i: two parts of different shapes and types."""
    mean = torch.full((4, 2, 2 + i % 3), float(i)).half()
    return {"mean": mean, "std": (mean / 8).bfloat16()}


def filled(folder: Path, encoder: Encoder, share: Share = ALONE, batch_size: int = 2) -> Cache:
    """The folder's cache, filled."""
    store = Cache(folder)
    fill(store, KEYS, encoder, share, batch_size=batch_size)
    return store


def assert_right(store: Cache) -> None:
    """All ten entries, bit for bit."""
    for i, key in enumerate(KEYS):
        entry = store[key]
        assert entry.keys() == {"mean", "std"}
        for part, tensor in right(i).items():
            assert entry[part].dtype == tensor.dtype
            assert torch.equal(entry[part], tensor)


def shards(folder: Path) -> list[Path]:
    """The shards in the order in which they were written."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_everything_is_encoded_once_in_batches(tmp_path: Path) -> None:
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder, batch_size=3))
    assert encoder.asked == list(range(10))
    assert encoder.sizes == [3, 3, 3, 1]
    again = Encoder(stop=0)
    assert_right(filled(tmp_path, again))
    assert again.asked == []


def test_the_same_key_twice_is_one_entry(tmp_path: Path) -> None:
    encoder = Encoder()
    store = Cache(tmp_path)
    fill(store, [KEYS[3], KEYS[1], KEYS[3]], encoder)
    assert encoder.asked == [0, 1]
    assert KEYS[3] in store
    assert KEYS[0] not in store
    with pytest.raises(KeyError):
        store[KEYS[0]]


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Encoder(stop=7))
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder))
    assert encoder.asked == [6, 7, 8, 9]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_while_a_shard_is_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            filled(tmp_path, Encoder())
    assert shards(tmp_path) == []
    leftovers = list(tmp_path.iterdir())
    assert leftovers
    for leftover in leftovers:
        os.utime(leftover, (0, 0))
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder))
    assert encoder.asked == list(range(10))
    assert not any(leftover.exists() for leftover in leftovers)


NO_SPACE = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error,expected,said",
    [
        (OSError(errno.ENOSPC, NO_SPACE), NotWritten, f"cannot be written ({NO_SPACE})"),
        (SafetensorError(f"I/O error:\n{NO_SPACE}"), NotWritten, f"(I/O error: {NO_SPACE})"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=["full", "full, as safetensors says it", "Ctrl-C"],
)
def test_a_shard_that_cannot_be_written_leaves_nothing(
    error: BaseException,
    expected: type[BaseException],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", half)
        with pytest.raises(expected) as raised:
            filled(tmp_path / "here", Encoder())
    if said:
        assert str(raised.value).startswith(str(tmp_path / "here"))
        assert said in str(raised.value)
    assert list((tmp_path / "here").iterdir()) == []
    assert_right(filled(tmp_path / "here", Encoder()))


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    fill(Cache(tmp_path), KEYS[2:5], lambda indices: [right(i + 2) for i in indices])
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder))
    assert encoder.asked == [0, 1, 5, 6, 7, 8, 9]


def filled_together(folders: Sequence[Path], encoders: Sequence[Encoder]) -> list[Cache]:
    """The caches of several processes that fill them at once, each its folder."""
    pairs = zip(folders, encoders, strict=True)
    return together([partial(filled, folder, encoder) for folder, encoder in pairs])


def test_processes_share_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each encodes a part, and all read the whole."""
    encoders = [Encoder(), Encoder()]
    for store in filled_together([tmp_path, tmp_path], encoders):
        assert_right(store)
    assert encoders[0].asked == [0, 2, 4, 6, 8]
    assert encoders[1].asked == [1, 3, 5, 7, 9]
    assert "not shared" not in caplog.text


def test_a_process_that_fails_ends_the_others_before_they_have_done_all(tmp_path: Path) -> None:
    """After the shard that each is at; what was encoded is kept."""

    class Failing(Encoder):
        def __call__(self, indices: Sequence[int]) -> list[Entry | None]:
            if 1 in indices:
                raise UserError("this one cannot be had")
            return super().__call__(indices)

    encoders = [Encoder(), Failing()]
    ends: list[str] = []

    def one(encoder: Encoder, share: Share) -> None:
        with pytest.raises(UserError, match="this one cannot be had") as raised:
            filled(tmp_path, encoder, share)
        ends.append(str(raised.value))

    together([partial(one, encoder) for encoder in encoders])
    assert len(ends) == 2
    assert encoders[0].asked == [0, 2, 4, 6], "8 is of the next shard"
    assert all(KEYS[i] in Cache(tmp_path) for i in encoders[0].asked)


def test_processes_without_a_common_folder_each_get_the_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four on two machines: those of a machine share its part of the work; it is said."""
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "other", tmp_path / "other"]
    encoders = [Encoder() for _ in folders]
    for store in filled_together(folders, encoders):
        assert_right(store)
    for machine in (encoders[:2], encoders[2:]):
        assert sorted(i for encoder in machine for i in encoder.asked) == list(range(10))
    assert f"{tmp_path / 'one'} is not shared by all processes" in caplog.text
    assert caplog.text.count("is not shared") == 4, "each says it once, however many shards"


@pytest.mark.parametrize("shared", [True, False])
def test_what_one_process_cannot_encode_no_other_tries(tmp_path: Path, shared: bool) -> None:
    folders = [tmp_path / "0", tmp_path / ("0" if shared else "1")]
    encoders = [Encoder(bad=[2, 5]), Encoder(bad=[2, 5])]
    for store in filled_together(folders, encoders):
        assert [key for key in KEYS if key not in store] == [KEYS[2], KEYS[5]]
    assert [2 in encoder.asked for encoder in encoders] == [True, False]
    assert [5 in encoder.asked for encoder in encoders] == [False, True]


def test_two_writers_at_once_do_no_harm(tmp_path: Path) -> None:
    one, other = Cache(tmp_path), Cache(tmp_path)
    encoders = [Encoder(), Encoder()]
    fill(one, KEYS, encoders[0])
    fill(other, KEYS, encoders[1])
    assert encoders[0].asked == encoders[1].asked
    assert_right(one)
    assert_right(other)
    assert_right(Cache(tmp_path))


def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """Keep the length alone."""
    path.write_bytes(bytes(path.stat().st_size))


def foreign(path: Path) -> None:
    """A shard that no cache wrote."""
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [cut, zero, foreign, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_shard_is_made_again_alone(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, Encoder())
    victim = shards(tmp_path)[1]
    damage(victim)
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder))
    assert encoder.asked == [4, 5, 6, 7]
    assert (str(victim) in caplog.text) == (damage is not Path.unlink)
    assert_right(filled(tmp_path, Encoder(stop=0)))


def test_one_flipped_bit_costs_one_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, Encoder())
    victim = shards(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor, by name: picture-7
    victim.write_bytes(content)
    encoder = Encoder()
    assert_right(filled(tmp_path, encoder))
    assert len(encoder.asked) == 1
    assert KEYS[encoder.asked[0]] in caplog.text
    caplog.clear()
    assert_right(filled(tmp_path, Encoder(stop=0)))
    assert caplog.text == ""


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
