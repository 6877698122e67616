"""Files and folders appear whole or not at all, whatever their names are."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from ldm_pipeline.errors import UserError
from ldm_pipeline.replacing import replacing


@pytest.mark.parametrize("name", ["a", "a" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_disk_takes(name: str, tmp_path: Path) -> None:
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("old")
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("new")
        assert (tmp_path / name).read_text() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")

    def broken(name: str, error: BaseException) -> None:
        with replacing(tmp_path / name) as temporary:
            temporary.mkdir()
            (temporary / "half").write_text("new")
            raise error

    with pytest.raises(KeyboardInterrupt):
        broken("there", KeyboardInterrupt())
    with pytest.raises(UserError, match=r"cannot write .*gone: No space left"):
        broken("gone", OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "no/folder") as place:
        place.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_takes_its_name_but_not_another_s(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    for name in ("empty", "full"):
        with (
            pytest.raises(UserError, match="cannot write") if name == "full" else nullcontext(),
            replacing(tmp_path / name) as temporary,
        ):
            (temporary / "inside").mkdir(parents=True)
            (temporary / "inside/file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "empty/inside/file").is_file()
    assert (tmp_path / "full/mine").is_file()


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is flushed while it still has the temporary name; then the folder of the name."""
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "ldm_pipeline.replacing.flush",
        lambda path: flushed.append((path.name, (tmp_path / "out").exists())),
    )
    with replacing(tmp_path / "out") as temporary:
        (temporary / "inside").mkdir(parents=True)
        (temporary / "inside/one").touch()
        (temporary / "two").touch()
    assert sorted(flushed[:-1]) == [("one", False), ("two", False)]
    assert flushed[-1] == (tmp_path.name, True)
