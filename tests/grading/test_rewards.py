from __future__ import annotations

from pathlib import Path

import pytest

from retool.errors import ConfigError, InvariantError
from retool.grading.rewards import find_reward, paper, verl
from retool.types import Finish, Grade, Task, TokenOutput, Trajectory, Turn


def graded(correct: bool, calls: int = 0) -> Trajectory:
    """With ``calls`` turns that call, each answered, and one that does not."""
    output = TokenOutput([1], [-1.0], Finish.STOP)
    turns = [Turn(output, observation_ids=[2]) for _ in range(calls)] + [Turn(output)]
    return Trajectory(Task("t/7", "s", [], "72"), 0, [1], turns, grade=Grade(correct))


@pytest.mark.parametrize(
    ("correct", "calls", "reward"),
    [
        (True, 0, 1.0),
        (True, 9, 1.0),
        (False, 0, -1.0),
        (False, 1, -0.9),
        (False, 2, -0.8),
        (False, 3, -0.7),
        (False, 4, -0.6),
        (False, 5, -0.6),
        (False, 50, -0.6),
    ],
)
def test_verl_softens_a_wrong_answer_by_its_calls(correct: bool, calls: int, reward: float) -> None:
    """num_turns = 2 + 2 · calls, so (num_turns − 2) / 2 is the number of calls: −1 + 0.1 · calls, at most −0.6."""
    assert graded(correct, calls).num_turns == 2 + 2 * calls
    assert verl(graded(correct, calls)) == pytest.approx(reward)
    assert paper(graded(correct, calls)) == (1.0 if correct else -1.0)


def test_as_verls_recipe_writes_it() -> None:
    """compute_score of the recipe: if score < 0: score = min(-0.6, score + (num_turns - 2) / 2 * 0.1)."""
    for calls in range(20):
        trajectory = graded(False, calls)
        assert verl(trajectory) == min(-0.6, -1.0 + (trajectory.num_turns - 2) / 2 * 0.1)


def test_a_trajectory_without_a_turn_is_wrong() -> None:
    empty = Trajectory(Task("t", "s", [], "1"), 0, [1], grade=Grade(False))
    assert verl(empty) == pytest.approx(-1.05)  # verl's own formula: num_turns is 1
    with pytest.raises(InvariantError, match="before the trajectory is graded"):
        paper(Trajectory(Task("t", "s", [], "1"), 0, [1]))


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "nowhere"))  # puts sys.path back afterwards
    (tmp_path / "own_reward_module.py").write_text(
        "def brief(t): return (1 if t.grade.correct else -1) - len(t.turns) / 10\n"
        "def silent(t): return None\n"
        "def endless(t): return float('inf')\n"
        "def sure(t): return True\n"
        "number = 5\n"
    )
    assert find_reward("own_reward_module:brief")(graded(True, 2)) == pytest.approx(0.7)
    for name, shown in (("silent", "None"), ("endless", "inf"), ("sure", "True")):
        with pytest.raises(ConfigError, match=f"for task t/7 it returned {shown}; return a finite number"):
            find_reward(f"own_reward_module:{name}")(graded(True))
    with pytest.raises(ConfigError, match="number is no function"):
        find_reward("own_reward_module:number")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("papr", "rl.reward = 'papr': give one of paper, verl, or package.module:function"),
        ("no_such_module:f", "cannot be imported .ModuleNotFoundError"),
        ("math:no_such_function", "cannot be imported .AttributeError"),
        ("math:", "give one of paper, verl"),
        (":f", "give one of paper, verl"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        find_reward(name)
    assert "\n" not in str(caught.value)


def test_presets_by_name() -> None:
    assert (find_reward("paper"), find_reward("verl")) == (paper, verl)
