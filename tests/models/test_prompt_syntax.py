"""Laws of the prompt syntax: every text is read, and what was read can be written down again."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ldm_pipeline.models.prompt_syntax import HEAVIEST, Part, Prompt, escape, parse, write

SYNTAX = st.sampled_from(
    ["(", ")", "[", "]", "\\", ":", "<", ">", "BREAK", " ", "AND", "1.3", ":0.5)", ":-2)", ":x)",
     ":1e9)", "<lora:a:1>", "red", "blue ", "|", "\n", "é", "1", "."]
)  # fmt: skip
texts = st.lists(SYNTAX | st.text(max_size=3), max_size=20).map("".join)


def said(text: str) -> list[list[tuple[str, float]]]:
    """The parts of each section, weights to 6 digits."""
    return [[(p.text, round(p.weight, 6)) for p in section] for section in parse(text).sections]


@given(texts)
def test_any_text_is_read(text: str) -> None:
    prompt = parse(text)
    assert prompt.sections
    assert all(prompt.sections) or prompt.sections == ((),)
    for section in prompt.sections:
        assert all(part.text and abs(part.weight) <= HEAVIEST for part in section)
        assert all(a.weight != b.weight for a, b in pairwise(section))
    assert len(set(prompt.complaints)) == len(prompt.complaints)


@given(texts)
@example("BREAK (a )BREAK")
@example("(x:1.2)\\BREAK y\\\\")
def test_what_was_read_can_be_written_and_read_again(text: str) -> None:
    prompt = parse(text)
    assert parse(write(prompt)).sections == prompt.sections


@given(texts)
@example("\\BREAK")
@example("a:1.3)")
@example("<lora:a:1>")
def test_an_escaped_text_stands_for_itself(text: str) -> None:
    assert parse(escape(text)).sections == (((Part(text),) if text else ()),)


@given(st.text(st.characters(exclude_characters="()[]\\<BA")))
def test_a_text_without_syntax_is_one_part_and_nothing_is_said(text: str) -> None:
    assert parse(text) == Prompt(((Part(text),) if text else (),))
    assert escape(text) == write(parse(text)) == text


@given(st.lists(st.floats(-3, 3).map(lambda w: round(w, 3)), min_size=1, max_size=6))
def test_weights_multiply(weights: list[float]) -> None:
    text = "x"
    for weight in weights:
        text = f"({text}:{weight})"
    ((part,),) = parse(text).sections
    assert part.weight == pytest.approx(max(-100, min(100, math.prod(weights))), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a (red:1.3) star", [[("a ", 1), ("red", 1.3), (" star", 1)]]),
        ("(a)((b))[c]", [[("a", 1.1), ("b", 1.21), ("c", 0.909091)]]),
        ("(a (b:2) c:0.5)", [[("a ", 0.5), ("b", 1), (" c", 0.5)]]),
        ("(a [b) c]", [[("a ", 1.1), ("b", 1), (" c", 0.909091)]]),
        ("(a:.5)(b: +2. )(c:-1)", [[("a", 0.5), ("b", 2), ("c", -1)]]),
        ("one BREAK two\nBREAK\nthree", [[("one", 1)], [("two", 1)], [("three", 1)]]),
        ("BREAK BREAK one BREAK", [[("one", 1)]]),
        ("(one BREAK two:2)", [[("one", 2)], [("two", 2)]]),
        ("BREAKFAST break", [[("BREAKFAST break", 1)]]),
        (r"\(a\) \[b\] \\ \o/", [[(r"(a) [b] \ \o/", 1)]]),
        ("ratio 16:9", [[("ratio 16:9", 1)]]),
        ("(:2)()[]", [[]]),
    ],
)
def test_the_syntax(text: str, parts: list[list[tuple[str, float]]]) -> None:
    assert said(text) == parts
    assert parse(text).complaints == ()


@pytest.mark.parametrize(
    ("text", "parts", "complaint"),
    [
        ("a (b", [[("a ", 1), ("b", 1.1)]], "'(' is never closed"),
        ("a [b", [[("a ", 1), ("b", 0.909091)]], "'[' is never closed"),
        ("a) b", [[("a) b", 1)]], "')' closes nothing"),
        ("a:2) b", [[("a:2) b", 1)]], "')' closes nothing"),
        ("a] b", [[("a] b", 1)]], "']' closes nothing"),
        ("(a:big)", [[("a:big", 1.1)]], "'big' is no number"),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]], "'1.2.3' is no number"),
        ("(a:nan)", [[("a:nan", 1.1)]], "'nan' is no number"),
        ("(a:1e999)", [[("a", 100)]], "held at 100"),
        ("(a:-150)", [[("a", -100)]], "held at 100"),
        ("[a:b:0.5]", [[("a:b:0.5", 0.909091)]], "'[a:b:0.5]' would change the words"),
        ("[a|b]", [[("a|b", 0.909091)]], "'[a|b]' would change the words"),
        ("a AND b", [[("a AND b", 1)]], "AND does not join"),
        ("a <lora:b:0.8> c", [[("a  c", 1)]], "<lora:b:0.8> is left out"),
    ],
)
def test_what_is_not_understood_is_said(
    text: str, parts: list[list[tuple[str, float]]], complaint: str
) -> None:
    assert said(text) == parts
    (only,) = parse(text).complaints
    assert complaint in only


def test_a_deep_nest_is_read_in_the_time_of_its_length() -> None:
    deep = "(" * 20_000 + "x" + ")" * 20_000
    assert parse(deep).sections == ((Part("x", HEAVIEST),),)
