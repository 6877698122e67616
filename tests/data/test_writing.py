"""A folder is written as a whole, or it is as it was."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_pipeline.data.writing import NotWritten, settle_folder, write_folder
from tests.kills import killed_at


def filled(*names: str, text: str) -> Callable[[Path], None]:
    """What writes files of these names, each with `text`."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


OLD = {"text/model": "old", "unet/model": "old"}
NEW = {"text/model": "new", "unet/model": "new"}


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every renaming, move and removal; never a part of each."""
    places = [(Path, "rename"), (Path, "replace"), (Path, "write_text"), (shutil, "rmtree")]
    seen, finished, stop_at = [], False, 0
    while not finished:
        folder = tmp_path / str(stop_at) / "final"
        write_folder(folder, filled(*OLD, text="old"))
        (folder / "mine").write_text("mine")
        stop_at += 1
        with killed_at(stop_at, places, monkeypatch) as ended:
            write_folder(folder, filled(*NEW, text="new"))
        finished = ended[0]
        settle_folder(folder)
        found = contents(folder)
        assert found in ({**OLD, "mine": "mine"}, NEW)
        seen.append(found == NEW)
        write_folder(folder, filled(*NEW, text="new"))
        assert contents(folder.parent) == {
            **{f"final/{name}": text for name, text in NEW.items()}, "final.before/mine": "mine"
        }  # fmt: skip
    assert seen == sorted(seen)
    assert {True, False} <= set(seen)


def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the renaming itself."""
    folder = tmp_path / "final"
    write_folder(folder, filled(*OLD, text="old"))

    def half(place: Path) -> None:
        filled("unet/model", text="new")(place)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotWritten, match="No space left"):
        write_folder(folder, half)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith("unfinished"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(NotWritten, match="Input/output error"):
        write_folder(folder, filled(*NEW, text="new"))
    assert contents(tmp_path) == {f"final/{name}": text for name, text in OLD.items()}


def test_a_linked_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "final").mkdir(parents=True)
    link = tmp_path / "final"
    link.symlink_to(tmp_path / "elsewhere" / "final")
    write_folder(link, filled(*NEW, text="new"))
    assert link.is_symlink()
    assert contents(tmp_path / "elsewhere") == {f"final/{n}": text for n, text in NEW.items()}


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "ldm_pipeline.replacing.flush",
        lambda path: flushed.append((path.name, (tmp_path / "new").exists())),
    )
    write_folder(tmp_path / "new", filled("unet/model", "text/words", text="new"))
    assert sorted(flushed) == [("model", False), ("words", False)]
