"""The table of parity: every feature with every task, against stock diffusers (see features.py).

`docs/parity.md` shows a cell for each, the README one for each group of features. Each cell is
compared anew by a test here, and must be what the page says.

python -m tests.parity.test_table compares all and writes both tables.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.parity.features import FEATURES
from tests.parity.tasks import TASKS

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs/parity.md", ROOT / "README.md"
BEGIN, END = "<!-- parity: written by tests/parity/test_table.py -->", "<!-- /parity -->"

SAME, OTHER, NONE = "0", "≠", "–"
"""Cells: no difference in any bit; another picture, on purpose; stock has nothing of the kind."""

MEANT = {
    ("bfloat16", "XL image"),
    ("bfloat16", "XL inpaint"),
    ("bfloat16", "XL inpaint, 9 ch."),
    ("`negative_crops_coords_top_left`", "XL image"),
    ("`negative_crops_coords_top_left`", "XL inpaint"),
    ("`negative_crops_coords_top_left`", "XL inpaint, 9 ch."),
    ("`denoising_end`", "XL inpaint"),
}
"""Where our picture is another one, for reasons that `LatentDiffusionXLPipeline.__call__` gives."""

Cells = dict[str, dict[str, str]]
"""The table's cells, by row and column."""

ROWS = [(group, name) for group, features in FEATURES.items() for name in features]


def cell(group: str, feature: str, task: str) -> str:
    """What a comparison gives."""
    found = FEATURES[group][feature](TASKS[task])
    if found is None:
        return NONE
    return SAME if found == 0 else OTHER


def summary(cells: Cells) -> Cells:
    """A row for each group: its worst cell."""
    found: Cells = {}
    for group, features in FEATURES.items():
        found[group] = {
            task: max((cells[name][task] for name in features), key=[NONE, SAME, OTHER].index)
            for task in TASKS
        }
    return found


def markdown(cells: Cells) -> str:
    """A table in Markdown."""
    lines = [["", *TASKS], ["---"] * (len(TASKS) + 1)]
    lines += [[name, *(row[task] for task in TASKS)] for name, row in cells.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def grouped(cells: Cells) -> str:
    """The whole table, a part for each group of features."""
    parts = (
        f"### {group}\n\n{markdown({name: cells[name] for name in features})}"
        for group, features in FEATURES.items()
    )
    return "\n".join(parts)


def between(page: Path) -> str:
    """What a page holds between the marks."""
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def read(text: str) -> Cells:
    """The cells of every table in a text."""
    found: Cells = {}
    tasks: list[str] = []
    for line in text.splitlines():
        if line.startswith("|"):
            name, *said = (part.strip() for part in line.strip("|").split("|"))
            if not name:
                tasks = said
            elif name != "---":
                found[name] = dict(zip(tasks, said, strict=True))
    return found


PAGE = read(between(DOCS)) if DOCS.exists() else {}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("group,feature", ROWS, ids=[feature for _, feature in ROWS])
def test_a_cell(group: str, feature: str, task: str) -> None:
    """What is compared is what the page says: the same picture, but where another one is meant."""
    found = cell(group, feature, task)
    assert found == PAGE[feature][task], "python -m tests.parity.test_table writes it anew"
    assert (found == OTHER) == ((feature, task) in MEANT)


def test_the_pages_hold_these_tables() -> None:
    """All rows and columns, none besides, and in the README what follows from them."""
    assert list(PAGE) == [feature for _, feature in ROWS]
    assert between(DOCS) == f"\n\n{grouped(PAGE)}\n"
    assert between(README) == f"\n\n{markdown(summary(PAGE))}\n"


def test_the_table_says_what_differs() -> None:
    """A single bit in one cell is another table, and another row in the README."""
    cells = {name: dict.fromkeys(TASKS, SAME) for _, name in ROWS}
    assert {said for row in summary(cells).values() for said in row.values()} == {SAME}
    group, feature = ROWS[-2]
    cells[feature]["image"] = OTHER
    assert summary(cells)[group] == {task: OTHER if task == "image" else SAME for task in TASKS}
    assert read(grouped(cells)) == cells


def write() -> None:
    """Compare everything, and put both tables where they belong."""
    cells: Cells = {}
    for (group, feature), task in itertools.product(ROWS, TASKS):
        cells.setdefault(feature, {})[task] = cell(group, feature, task)
    for page, text in ((DOCS, grouped(cells)), (README, markdown(summary(cells)))):
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
