"""Made-up trajectories and runs: for tests of what counts and shows them, never shown as results."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.metrics import evaluation_summary, rollout_metrics
from retool.store import RunFolder
from retool.types import (
    ExecutionResult,
    ExecutionStatus,
    Finish,
    Grade,
    StopReason,
    Task,
    TokenOutput,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

OK, ERROR = ExecutionStatus.OK, ExecutionStatus.ERROR
WORD_IDS = 997


def make_task(number: int = 0, answer: str = "72", family: str | None = None, question: str = "What is it?") -> Task:
    messages = [{"role": "system", "content": "Solve the problem."}, {"role": "user", "content": question}]
    return Task(f"world/test/{number}", "world", messages, answer, {"family": family} if family else {})


def _ids(text: str) -> list[int]:
    return [sum(map(ord, word)) % WORD_IDS for word in text.split()]


def make_turn(text: str, call: ToolCall | None = None, result: ExecutionResult | None = None) -> Turn:
    """A turn of at most one call; what the model is shown follows from the call and its result."""
    shown = (result.text if result else call.error or "") if call else ""
    ids = _ids(text)
    return Turn(
        output=TokenOutput(ids, [-0.5 / (i + 1) for i in range(len(ids))], Finish.STOP),
        text=text,
        calls=[call] if call else [],
        executions=[result] if call else [],
        observation_ids=[7, *_ids(shown), 7] if call else [],
        observation_text=f"<tool_response>\n{shown}\n</tool_response>" if call else "",
    )


def code_turn(prose: str, code: str, result: ExecutionResult) -> Turn:
    raw = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    return make_turn(f"{prose}\n<tool_call>\n{raw}\n</tool_call><|im_end|>", ToolCall(code, raw=f"\n{raw}\n"), result)


def malformed_turn(prose: str, raw: str) -> Turn:
    call = ToolCall(None, "the call is no JSON", raw)
    return make_turn(f"{prose}\n<tool_call>{raw}</tool_call><|im_end|>", call)


def make_trajectory(
    task: Task,
    sample: int = 0,
    prediction: str | None = None,
    turns: list[Turn] | None = None,
    stop: StopReason = StopReason.ANSWERED,
) -> Trajectory:
    correct = prediction == task.answer
    final = (
        f"The answer is \\boxed{{{prediction}}}.<|im_end|>" if prediction is not None else "I do not know.<|im_end|>"
    )
    return Trajectory(
        task,
        sample,
        prompt_ids=_ids(task.messages[-1]["content"]),
        turns=[*(turns or []), make_turn(final)],
        stop_reason=stop,
        reward=1.0 if correct else -1.0,
        grade=Grade(correct, prediction),
    )


def make_group(task: Task, predictions: list[str | None], infra: int = 0) -> TrajectoryGroup:
    members = [make_trajectory(task, i, p) for i, p in enumerate(predictions)]
    lost = [Trajectory(task, len(members) + i, [1], [], StopReason.INFRA) for i in range(infra)]
    return TrajectoryGroup(task, members, lost)


# --- a whole quickstart ---------------------------------------------------------------------------------------------

HARD = {
    "mul": "What is {0} × {1}?",
    "gcd": "What is the greatest common divisor of {0} and {1}?",
    "modpow": "What is the remainder of {0}^{1} divided by 97?",
    "digit_sum": "What is the sum of the digits of {0} × {1}?",
    "primes": "How many primes lie between {0} and {0} + {1}?",
}
EASY = {"last_digit": "What is the last digit of {0}{1}?"}
PROGRAMS = {
    "mul": "print({0} * {1})",
    "gcd": "import math\n\nprint(math.gcd({0}, {1}))",
    "modpow": "print(pow({0}, {1}, 97))",
    "digit_sum": "product = {0} * {1}\ntotal = 0\nfor digit in str(product):\n    total += int(digit)\nprint(total)",
    "primes": (
        "def is_prime(n):\n    # trial division is enough here\n"
        "    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))"
        "\n\nprint(sum(is_prime(n) for n in range({0}, {0} + {1} + 1)))"
    ),
    "last_digit": "print({1} % 10)",
}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _answer(family: str, a: int, b: int) -> int:
    return {
        "mul": lambda: a * b,
        "gcd": lambda: math.gcd(a, b),
        "modpow": lambda: pow(a, b, 97),
        "digit_sum": lambda: sum(map(int, str(a * b))),
        "primes": lambda: sum(map(_is_prime, range(a, a + b + 1))),
        "last_digit": lambda: b % 10,
    }[family]()


def _problem(rng: random.Random, number: int) -> tuple[Task, str, int, int]:
    families = HARD | EASY
    family = list(families)[number % len(families)]
    a, b = rng.randint(1000, 99999), rng.randint(11, 999)
    task = make_task(number, str(_answer(family, a, b)), family, families[family].format(a, b))
    return task, family, a, b


def _attempt(
    rng: random.Random, problem: tuple[Task, str, int, int], sample: int, skill: float, calls: float
) -> Trajectory:
    """An attempt by a model that calls with chance ``calls`` and gets a called program right with chance ``skill``."""
    task, family, a, b = problem
    if rng.random() > (calls if family in HARD else calls * 0.3):
        right = family in EASY and rng.random() < 0.3 + skill * 0.65
        guess = task.answer if right else str(int(task.answer) + rng.randint(1, 90))
        return make_trajectory(task, sample, guess, [])
    code = PROGRAMS[family].format(a, b)
    turns = []
    if rng.random() < 0.12:
        broken = code.replace("print(", "print((", 1)
        stderr = f"  File \"main.py\", line 1\n    {broken.splitlines()[-1]}\nSyntaxError: '(' was never closed"
        turns.append(code_turn("I will compute this with code.", broken, ExecutionResult(ERROR, "", stderr, 1, 0.021)))
        turns.append(code_turn("A bracket is missing. Again:", code, ExecutionResult(OK, task.answer, "", 0, 0.018)))
    elif rng.random() < 0.04:
        turns.append(malformed_turn("I will compute this with code.", '{"name": "code_interpreter", "arguments": '))
    else:
        turns.append(code_turn("I will compute this with code.", code, ExecutionResult(OK, task.answer, "", 0, 0.015)))
    right = rng.random() < skill and turns[-1].calls[0].code is not None
    prediction = task.answer if right else task.answer[:-1] + str(rng.randint(0, 9)) + "1"
    return make_trajectory(task, sample, prediction, turns)


def attempts(seed: int, problems: int, k: int, skill: float, calls: float, first: int = 0) -> list[TrajectoryGroup]:
    drawn = random.Random(first)
    rng = random.Random(seed)
    groups = []
    for number in range(first, first + problems):
        problem = _problem(drawn, number)
        groups.append(TrajectoryGroup(problem[0], [_attempt(rng, problem, i, skill, calls) for i in range(k)]))
    return groups


def write_rl_run(path: Path, steps: int, calls_to: float, skill_to: float) -> RunFolder:
    run = RunFolder(path)
    run.write_config(Recipe())
    run.write_environment(seed=0, device="cpu")
    tracker = run.tracker()
    rng = random.Random(5)
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3.5 * step / steps)
        groups = attempts(
            step, 16, 6, 0.45 + (skill_to - 0.45) * done, calls_to and 0.35 + (calls_to - 0.35) * done, first=step * 100
        )
        line = rollout_metrics(groups) | {
            "actor/entropy": 0.42 * math.exp(-2 * step / steps) + rng.random() * 0.02,
            "training/rollout_logprob_gap_max": 4e-5 * (1 + rng.random()),
            "training/rollout_logprob_gap_mean": 2e-6 * (1 + rng.random()),
            "timing_s/step": 3.1 + rng.random(),
        }
        if step % 10 == 0:
            line |= {"val-core/world/acc/mean@1": min(0.99, line["acc/mean"] + 0.02)}
        tracker.log(step, line)
        if step in (1, steps):
            run.write_step(step, groups)
    tracker.close()
    return run


def write_quickstart(path: Path, steps: int = 40, problems: int = 120, text_only: bool = True) -> RunFolder:
    """A run folder as ``retool quickstart`` leaves it."""
    run = RunFolder(path)
    run.write_config(Recipe())
    run.write_environment(seed=0, device="cpu", model="nano", parameters=1_250_000)
    sft = RunFolder(path / "sft").tracker()
    for step in range(1, 121):
        sft.log(step, {"train/loss": 0.2 + 2.2 * math.exp(-step / 25), "train/lr": 1e-3})
    sft.close()
    write_rl_run(path / "grpo", steps, calls_to=0.97, skill_to=0.93)
    stages: dict[str, tuple[float, float]] = {"base": (0.0, 0.0), "sft": (0.45, 0.4), "grpo": (0.93, 0.97)}
    if text_only:
        write_rl_run(path / "text_only", steps, calls_to=0.0, skill_to=0.8)
        stages["text_only"] = (0.8, 0.0)
    summary: dict[str, Any] = {"wall_seconds": 512.4, "seed": 0}
    for stage, (skill, calls) in stages.items():
        groups = attempts(hash_of(stage), problems, 1, skill, calls)
        summary[stage] = evaluation_summary(groups, k=1, bootstrap=500, seed=0)
        run.write_eval(stage, groups)
    run.write_summary(summary)
    return run


def hash_of(text: str) -> int:
    return sum(map(ord, text))
