"""A turn falls into prose, code and output; the problems shown are picked by rule."""

from __future__ import annotations

import re

import pytest
from synthetic import ERROR, OK, attempts, code_turn, make_task, make_trajectory, make_turn, malformed_turn

from retool.report.load import Stage
from retool.report.transcripts import PREVIEW, choose_problems, highlight, turn_pieces, visible
from retool.types import ExecutionResult, ExecutionStatus, Finish, TokenOutput, ToolCall, Trajectory, Turn


def _bare(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_a_turn_reads_prose_code_output() -> None:
    pieces = turn_pieces(code_turn("Let me see.", "x = 1\nprint(x)", ExecutionResult(OK, "1\n", "", 0)))
    assert [p.kind for p in pieces] == ["prose", "code", "output"]
    assert pieces[0].html == "Let me see." and _bare(pieces[1].html) == "x = 1\nprint(x)"
    assert (pieces[2].html, pieces[2].label, pieces[2].good) == ("1", "ok", True)


def test_several_calls_of_a_turn_stay_beside_their_results() -> None:
    text = "A<tool_call>one</tool_call>B<tool_call>two</tool_call>C<|im_end|>"
    calls = [ToolCall("print(1)", raw="one"), ToolCall("print(2)", raw="two")]
    results = [ExecutionResult(OK, "1"), ExecutionResult(ExecutionStatus.TIMEOUT, "", duration_s=5.0)]
    pieces = turn_pieces(Turn(TokenOutput([1], [0.0], Finish.STOP), text, calls, [*results]))
    assert [_bare(p.html) for p in pieces] == [
        "A",
        "print(1)",
        "1",
        "B",
        "print(2)",
        "TimeoutError: the code ran out of time",
        "C",
    ]
    assert [p.label for p in pieces if p.kind == "output"] == ["ok", "timeout"]


def test_the_papers_tags_and_fences_are_stripped() -> None:
    raw = "print(1)"
    text = f"So:\n<code>\n```python\n{raw}\n```\n</code>"
    turn = Turn(TokenOutput([1], [0.0], Finish.STOP), text, [ToolCall(raw, raw=raw)], [ExecutionResult(OK, "1")])
    assert [_bare(p.html) for p in turn_pieces(turn)] == ["So:", "print(1)", "1"]


def test_a_malformed_call_is_shown_as_it_was_written() -> None:
    pieces = turn_pieces(malformed_turn("Hm.", '{"name": <oops>'))
    assert [p.kind for p in pieces] == ["prose", "malformed", "output"]
    assert "&lt;oops&gt;" in pieces[1].html and pieces[2].html == "the call is no JSON" and not pieces[2].good


def test_a_call_that_was_not_run_shows_no_output() -> None:
    turn = Turn(TokenOutput([1], [0.0], Finish.STOP), "<tool_call>x</tool_call>", [ToolCall("x", raw="x")], [])
    assert [p.kind for p in turn_pieces(turn)] == ["code"]


def test_the_answer_is_marked_and_end_tokens_are_not_shown() -> None:
    (piece,) = turn_pieces(make_turn("It is \\boxed{<7>}.<|im_end|>\n<|endoftext|>"))
    assert piece.html == "It is <mark>\\boxed{&lt;7&gt;}</mark>."


def test_silent_and_endless_outputs() -> None:
    assert turn_pieces(code_turn("", "x", ExecutionResult(OK, "", "", 0, truncated=True)))[-1].html == "(no output)"
    long = turn_pieces(code_turn("", "x", ExecutionResult(OK, "y" * (PREVIEW + 1500), "", 0)))[-1].html
    assert long.endswith("… 1,500 more characters") and len(long) < PREVIEW + 40


def test_highlighting_keeps_every_character() -> None:
    code = "def f(x):\n\n    return '<b>' if x < 3 else \"&\"  # </script>\n\ttab"
    html = highlight(code)
    assert "<script" not in html and 'class="t-k"' in html
    unescaped = _bare(html).replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'").replace("&quot;", '"')
    assert unescaped.replace("&amp;", "&") == code


def test_control_characters_become_visible() -> None:
    assert visible("a\x00\x1bb\n\tc\r\n") == "a␀␛b\n\tc\n"


# --- the choice -----------------------------------------------------------------------------------------------------


def _stage(key: str, tried: list[Trajectory]) -> Stage:
    return Stage(key, key.title(), {}, {t.task.id: t for t in tried})


def _scenes() -> tuple[Stage, Stage]:
    """Six problems, one of each kind that a rule looks for and one that was right throughout."""
    tasks = [make_task(i, "72", f"family {i}") for i in range(6)]
    ran = code_turn("C", "print(72)", ExecutionResult(OK, "72"))
    failed = code_turn("C", "oops", ExecutionResult(ERROR, "", "NameError"))
    before = [make_trajectory(t, 0, "72" if i in (3, 5) else "0") for i, t in enumerate(tasks)]
    after = [
        make_trajectory(tasks[0], 0, "72", [ran]),
        make_trajectory(tasks[1], 0, "72", [failed, ran]),
        make_trajectory(tasks[2], 0, "72"),
        make_trajectory(tasks[3], 0, "0", [ran]),
        make_trajectory(tasks[4], 0, None, [failed]),
        make_trajectory(tasks[5], 0, "72", [ran]),
    ]
    return _stage("base", before), _stage("grpo", after)


def test_each_kind_is_found_once_with_its_count() -> None:
    choice = choose_problems(_scenes())
    assert choice is not None
    assert [(p.task.id.split("/")[-1], p.why) for p in choice.problems] == [
        ("0", "Wrong before, right after, with code: 2 of 6 problems"),
        ("1", "Wrong before, right after, with code: 2 of 6 problems"),
        ("2", "Right without running code: 1 of 6 problems"),
        ("3", "Right before, wrong after: 1 of 6 problems"),
        ("4", "Still wrong: 1 of 6 problems"),
    ]
    assert all([a.stage for a in p.attempts] == ["Base", "Grpo"] for p in choice.problems)


def test_a_mended_failure_is_shown_where_others_are_plain() -> None:
    before, after = _scenes()
    plain = [t for i, t in after.attempts.items() if not i.endswith("/1")]
    ran = code_turn("C", "print(72)", ExecutionResult(OK, "72"))
    extra = make_trajectory(make_task(9, "72", "family 9"), 0, "72", [ran])
    first = make_trajectory(make_task(9, "72", "family 9"), 0, "0")
    mended = after.attempts["world/test/1"]
    choice = choose_problems(
        [_stage("base", [first, *before.attempts.values()]), _stage("grpo", [extra, *plain, mended])]
    )
    assert choice is not None and "Its code failed, it mended it: 1 of 7 problems" in [p.why for p in choice.problems]


def test_the_control_is_shown_but_is_not_the_after() -> None:
    before, after = _scenes()
    control = Stage("text_only", "Text only", {}, dict(before.attempts))
    choice = choose_problems([before, after, control])
    assert choice is not None and "after is Grpo" in choice.how
    assert [a.stage for a in choice.problems[0].attempts] == ["Base", "Grpo", "Text only"]


def test_two_of_a_kind_come_from_two_families() -> None:
    groups = attempts(1, 48, 1, 1.0, 1.0)
    after = [g.trajectories[0] for g in groups]
    choice = choose_problems([_stage("base", [make_trajectory(t.task, 0, None) for t in after]), _stage("grpo", after)])
    assert choice is not None
    first, second = [p.task.meta["family"] for p in choice.problems if p.why.startswith("Wrong before")]
    assert first != second


def test_stages_without_a_shared_problem_stand_apart() -> None:
    one = _stage("step_1", [make_trajectory(make_task(1), 0, "72"), make_trajectory(make_task(2), 0, "0")])
    two = _stage("step_9", [make_trajectory(make_task(3), 0, None)])
    choice = choose_problems([one, two])
    assert choice is not None
    assert [p.why for p in choice.problems] == [
        "Step_1, right: 1 of 2 problems",
        "Step_1, wrong: 1 of 2 problems",
        "Step_9, wrong: 1 of 1 problems",
    ]
    assert choice.problems[-1].attempts[0].prediction is None and choice.problems[-1].attempts[0].ending == "answered"


@pytest.mark.parametrize("stages", [[], [Stage("base", "Base")]])
def test_nothing_kept_is_nothing_to_choose(stages: list[Stage]) -> None:
    assert choose_problems(stages) is None
