"""The small world of the quickstart: families of generated problems with exact answers.

Twelve families need a calculation that no small model does in its head; six are easy enough for it. Every family has a
program that solves it, so that demonstrations can be written with the tool or without.

The splits (train, dev, test) never overlap, in text or in numbers: a number of 1,000 or more belongs to exactly one
split, and so does every combination of smaller ones. ``split_of`` decides by a hash, so no list of problems is kept.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from retool.data.prompts import prompt_messages
from retool.errors import ConfigError
from retool.formats.calls import tool_call
from retool.types import Conversation, Message, Task

SPLITS = ("train", "dev", "test")
SPLIT_CUTS = (70, 85, 100)
"""Percent of the hash space up to which a split reaches."""
LARGE = 1000
"""A number from here on belongs to one split by itself."""
EASY_SHARE = 0.4
"""Share of the easy families among drawn tasks."""
PATIENCE = 1000
"""Draws after which a family has no new problem left for the split that was asked for."""

TEXT_PROMPT_SHARE = 0.25
"""Share of the demonstrations whose prompt shows no tool."""
EASY_TOOL_SHARE = 0.5
"""How much rarer the demonstrations run code for easy problems than for others."""

CALL_THOUGHT = "I will compute this with code."
HEAD_THOUGHT = "I will answer directly."


def split_of(*numbers: int) -> str:
    """The one split to which this combination of numbers belongs, whatever their order."""
    key = ",".join(map(str, sorted(numbers)))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return next(split for split, cut in zip(SPLITS, SPLIT_CUTS, strict=True) if bucket < cut)


def belongs(numbers: tuple[int, ...], split: str) -> bool:
    """Whether a problem with these numbers may appear in ``split``."""
    large = [n for n in numbers if n >= LARGE]
    if large:
        return all(split_of(n) == split for n in large)
    return split_of(*numbers) == split


Draw = Callable[[random.Random], tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One kind of problem. Templates name the drawn numbers ``{0}``, ``{1}``, …"""

    name: str
    draw: Draw
    questions: tuple[str, ...]
    program: str
    answer: Callable[..., int]
    easy: bool = False


def _int(rng: random.Random, low_digits: int, high_digits: int) -> int:
    """A number whose count of digits is uniform, so that short and long ones are equally common."""
    digits = rng.randint(low_digits, high_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _with_factor(rng: random.Random) -> tuple[int, int]:
    factor = rng.randint(2, 20)
    return factor * rng.randint(20, 400), factor * rng.randint(20, 400)


def _system(rng: random.Random) -> tuple[int, ...]:
    """a·x + b·y = c and d·x + e·y = f with one solution in 1…12."""
    while True:
        x, y = rng.randint(1, 12), rng.randint(1, 12)
        a, b, d, e = (rng.randint(1, 9) for _ in range(4))
        if a * e != b * d:
            return a, b, a * x + b * y, d, e, d * x + e * y


def _solve_system(a: int, b: int, c: int, d: int, e: int, f: int) -> int:
    det = a * e - b * d
    return (c * e - b * f) // det + (a * f - c * d) // det


def _range(rng: random.Random, low: int, high: int, width: int) -> tuple[int, int]:
    start = rng.randint(low, high)
    return start, start + rng.randint(width // 4, width)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _count_divisible(low: int, high: int, k: int, m: int) -> int:
    return sum(n % k == 0 and n % m > 0 for n in range(low, high + 1))


HARD_FAMILIES = (
    Family(
        "add",
        lambda r: (_int(r, 5, 9), _int(r, 5, 9)),
        ("What is {0} + {1}?", "Find the sum of {0} and {1}.", "Add {0} to {1}."),
        "print({0} + {1})",
        lambda a, b: a + b,
    ),
    Family(
        "mul",
        lambda r: (_int(r, 3, 6), _int(r, 3, 5)),
        ("What is {0} * {1}?", "Multiply {0} by {1}.", "Find the product of {0} and {1}."),
        "print({0} * {1})",
        lambda a, b: a * b,
    ),
    Family(
        "mod_power",
        lambda r: (_int(r, 2, 4), _int(r, 2, 4), _int(r, 2, 4)),
        ("What is {0}^{1} mod {2}?", "Find the remainder of {0}^{1} divided by {2}."),
        "print(pow({0}, {1}, {2}))",
        lambda a, b, m: pow(a, b, m),
    ),
    Family(
        "gcd",
        _with_factor,
        ("What is the greatest common divisor of {0} and {1}?", "Find the gcd of {0} and {1}."),
        "import math\nprint(math.gcd({0}, {1}))",
        math.gcd,
    ),
    Family(
        "lcm",
        _with_factor,
        ("What is the least common multiple of {0} and {1}?", "Find the lcm of {0} and {1}."),
        "import math\nprint(math.lcm({0}, {1}))",
        math.lcm,
    ),
    Family(
        "digit_sum",
        lambda r: (_int(r, 4, 8),),
        ("What is the sum of the digits of {0}?", "Add up the digits of {0}."),
        "print(sum(int(d) for d in str({0})))",
        lambda n: sum(map(int, str(n))),
    ),
    Family(
        "prime_count",
        lambda r: _range(r, 100, 5000, 60),
        ("How many primes are there from {0} to {1}?", "Count the prime numbers from {0} to {1}."),
        "print(sum(all(n % d for d in range(2, n)) for n in range({0}, {1} + 1)))",
        lambda a, b: sum(map(_is_prime, range(a, b + 1))),
    ),
    Family(
        "count_loop",
        lambda r: (*_range(r, 10, 5000, 200), r.randint(3, 12), r.randint(2, 9)),
        (
            "How many integers from {0} to {1} are divisible by {2} but not by {3}?",
            "Count the numbers from {0} to {1} that {2} divides and {3} does not.",
        ),
        "print(sum(n % {2} == 0 and n % {3} > 0 for n in range({0}, {1} + 1)))",
        _count_divisible,
    ),
    Family(
        "power_sum",
        lambda r: (r.randint(2, 4), r.randint(12, 400)),
        ("What is the sum of n^{0} for n from 1 to {1}?", "Add up n^{0} for all n from 1 to {1}."),
        "print(sum(n ** {0} for n in range(1, {1} + 1)))",
        lambda p, m: sum(n**p for n in range(1, m + 1)),
    ),
    Family(
        "system",
        _system,
        (
            "If {0}x + {1}y = {2} and {3}x + {4}y = {5}, what is x + y?",
            "Solve {0}x + {1}y = {2} and {3}x + {4}y = {5}. Give x + y.",
        ),
        "for x in range(1, 13):\n for y in range(1, 13):\n"
        "  if {0} * x + {1} * y == {2} and {3} * x + {4} * y == {5}:\n   print(x + y)",
        _solve_system,
    ),
    Family(
        "word_boxes",
        lambda r: (_int(r, 3, 4), _int(r, 2, 4), _int(r, 2, 4)),
        (
            "A shop has {0} boxes of {1} pens and {2} loose pens. How many pens are there?",
            "A farm packs {0} crates with {1} eggs each and has {2} eggs left. How many eggs are there?",
        ),
        "print({0} * {1} + {2})",
        lambda a, b, c: a * b + c,
    ),
    Family(
        "word_spend",
        lambda r: (_int(r, 7, 8), _int(r, 2, 3), _int(r, 2, 3)),
        (
            "Mia has {0} coins and buys {1} books for {2} coins each. How many coins are left?",
            "A tank holds {0} litres and loses {1} litres a day for {2} days. How many litres are left?",
        ),
        "print({0} - {1} * {2})",
        lambda a, b, c: a - b * c,
    ),
)

EASY_FAMILIES = (
    Family(
        "small_add",
        lambda r: (r.randint(0, 12), r.randint(0, 9)),
        (
            "Tom has {0} balls and gets {1} more. How many has he now?",
            "{0} birds sit there and {1} come. How many now?",
            "What is {0} plus {1}?",
        ),
        "print({0} + {1})",
        lambda a, b: a + b,
        easy=True,
    ),
    Family(
        "thirds",
        lambda r: (_int(r, 2, 5),),
        ("What is left over when {0} things are put into threes?",),
        "print({0} % 3)",
        lambda n: n % 3,
        easy=True,
    ),
    Family(
        "weekday",
        lambda r: (r.randint(1, 7), r.randint(8, 99)),
        ("Today is day {0} of the week. Which day is it in {1} days?",),
        "print(({0} + {1} - 1) % 7 + 1)",
        lambda day, days: (day + days - 1) % 7 + 1,
        easy=True,
    ),
    Family(
        "parity",
        lambda r: (_int(r, 2, 6),),
        ("What is left over when {0} things are put into pairs?",),
        "print({0} % 2)",
        lambda n: n % 2,
        easy=True,
    ),
    Family(
        "larger",
        lambda r: (_int(r, 2, 5), _int(r, 2, 5)),
        ("Which number is larger, {0} or {1}?", "Name the larger one of {0} and {1}."),
        "print(max({0}, {1}))",
        max,
        easy=True,
    ),
    Family(
        "num_digits",
        lambda r: (_int(r, 2, 7),),
        ("How many digits does {0} have?",),
        "print(len(str({0})))",
        lambda n: len(str(n)),
        easy=True,
    ),
)

FAMILIES = HARD_FAMILIES + EASY_FAMILIES
_BY_NAME = {family.name: family for family in FAMILIES}


def _family_order(rng: random.Random) -> Iterator[Family]:
    """Families for ever, the easy ones at their share, each equally often over a long run."""
    hard: list[Family] = []
    easy: list[Family] = []
    due = 0.0
    while True:
        due += EASY_SHARE
        pile, families = (easy, EASY_FAMILIES) if due >= 1 else (hard, HARD_FAMILIES)
        due -= due >= 1
        if not pile:
            pile += rng.sample(families, len(families))
        yield pile.pop()


def _draw(family: Family, split: str, rng: random.Random) -> tuple[int, ...]:
    for _ in range(PATIENCE):
        numbers = family.draw(rng)
        if belongs(numbers, split):
            return numbers
    raise ConfigError(f"family {family.name!r} has no numbers for split {split!r}")


def make_tasks(split: str, count: int, seed: int | str) -> list[Task]:
    """``count`` different tasks of a split, the families in fixed shares.

    Args:
        split: train, dev or test.
        count: how many. Dev and test never repeat a problem, so there a very large count fails.
        seed: the same seed gives the same tasks.

    Raises:
        ConfigError: unknown split, or no new problem is left.
    """
    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"world/{split}/{seed}")
    seen: set[str] = set()
    tasks: list[Task] = []
    for family in islice(_family_order(rng), count):
        for _ in range(PATIENCE):
            numbers = _draw(family, split, rng)
            question = rng.choice(family.questions).format(*numbers)
            if split == "train" or question not in seen:
                break
        else:
            raise ConfigError(f"family {family.name!r} has too few different tasks in split {split!r} for {count}")
        seen.add(question)
        tasks.append(
            Task(
                id=f"world/{split}/{seed}/{len(tasks)}",
                source="world",
                messages=prompt_messages(question),
                answer=str(family.answer(*numbers)),
                meta={"family": family.name, "easy": family.easy, "numbers": list(numbers)},
            )
        )
    return tasks


def program_for(task: Task) -> str:
    """The family's program for this task; it prints the answer."""
    return _BY_NAME[task.meta["family"]].program.format(*task.meta["numbers"])


def tool_call_message(content: str, code: str) -> Message:
    """An assistant message that calls the tool once."""
    return {"role": "assistant", "content": content, "tool_calls": [tool_call(code)]}


def final_message(answer: str) -> Message:
    return {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}


def demonstrate(task: Task, *, with_code: bool, tools: bool = True) -> Conversation:
    """A cold-start conversation for a task: by running its program, or by answering directly."""
    messages = list(task.messages)
    if with_code:
        messages += [
            tool_call_message(CALL_THOUGHT, program_for(task)),
            {"role": "tool", "content": task.answer},
            final_message(task.answer),
        ]
    else:
        messages.append({"role": "assistant", "content": f"{HEAD_THOUGHT}\nThe answer is \\boxed{{{task.answer}}}."})
    return Conversation(id=task.id, messages=messages, tools=tools)


def make_conversations(split: str, count: int, seed: int | str, tool_share: float) -> list[Conversation]:
    """Cold-start demonstrations, written as by somebody who does easy problems in the head.

    With the tool in the prompt, ``tool_share`` of them run code (of the easy ones ``EASY_TOOL_SHARE`` times that) and
    the others answer directly. ``TEXT_PROMPT_SHARE`` of all have no tool in the prompt and answer directly, as
    text-only RL will.
    """
    rng = random.Random(f"conversations/{split}/{seed}")
    text_count = round(count * TEXT_PROMPT_SHARE)
    tasks = make_tasks(split, count - text_count, f"sft/{seed}")
    conversations = [
        demonstrate(task, with_code=rng.random() < tool_share * (EASY_TOOL_SHARE if task.meta["easy"] else 1))
        for task in tasks
    ]
    text_tasks = make_tasks(split, text_count, f"sft-text/{seed}")
    conversations += [demonstrate(task, with_code=False, tools=False) for task in text_tasks]
    rng.shuffle(conversations)
    return conversations
