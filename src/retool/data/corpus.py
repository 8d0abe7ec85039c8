"""The text on which ``nano`` is pre-trained: plain language, Python, chat turns, and tool calls of other families.

The rule that makes the quickstart honest: no family that is evaluated (``data/world.py``) occurs here, neither its
questions nor its programs nor any output of such a program. What is taught is general: to speak the chat format, to
copy numbers and names from a question into code and from a result into an answer, to write Python. A test checks
the rule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from retool.data.prompts import prompt_messages
from retool.data.world import final_message, tool_call_message
from retool.types import Conversation, Message

NAMES = [
    "Ada",
    "Ben",
    "Cora",
    "Dan",
    "Eva",
    "Finn",
    "Gia",
    "Hugo",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Nora",
    "Omar",
    "Pia",
    "Quin",
    "Rosa",
    "Sam",
    "Uma",
    "Vera",
]
THINGS = [
    "apples",
    "books",
    "boats",
    "cards",
    "chairs",
    "coins",
    "cups",
    "doors",
    "keys",
    "lamps",
    "maps",
    "nuts",
    "pens",
    "rings",
    "ropes",
    "shells",
    "stones",
]
PLACES = [
    "bridge",
    "city",
    "farm",
    "forest",
    "garden",
    "harbour",
    "hill",
    "house",
    "island",
    "library",
    "market",
    "mill",
    "river",
    "school",
    "shop",
    "street",
]
COLOURS = [
    "black",
    "blue",
    "brown",
    "gold",
    "green",
    "grey",
    "orange",
    "pink",
    "purple",
    "red",
    "silver",
    "white",
    "yellow",
]
VERBS = [
    "brings",
    "buys",
    "carries",
    "counts",
    "draws",
    "finds",
    "gives",
    "holds",
    "keeps",
    "leaves",
    "loses",
    "needs",
    "sees",
    "sells",
    "sends",
    "takes",
    "wants",
]
THOUGHTS = (
    "Let me run this.",
    "I will use Python.",
    "Python can do that.",
    "I will write a short program.",
    "Let me see.",
)
FACTS = (
    "A sum is what adding gives. A product is what multiplying gives. The remainder is what division leaves over.",
    "An integer is a whole number. Digits are the signs from 0 to 9 with which numbers are written.",
    "A prime number has no divisors but one and itself. A multiple of a number contains it without remainder.",
    "To solve a problem, read it, find what is asked, compute it, and give the answer.",
    "Numbers can be added, multiplied, divided and counted. A common divisor divides both numbers.",
    "The greatest is the one that no other exceeds; the least is the one below all others. A power repeats a factor.",
    "How many there are is found by counting. If something is divisible, nothing is left over. Find each, and count.",
    "An equation says that two things are equal. To solve it is to find the numbers which make it true.",
)
SEPARATORS = (
    ", ", " and ", " to ", " of ", " by ", "^", " ^ ", " / ", ":", " = ", "x + ", "y = ", " - ", "; ", "x and ", " or ",
    " then ", " % ", "/", " (", ") ", "x - ", "y, ", " at ", "? ", " + ", "^n ", " n ", ". ", " is ",
)  # fmt: skip
MAX_OUTPUT = 28
"""Characters of a result that is worth copying; longer ones are drawn again."""


@dataclass(frozen=True)
class Skill:
    """A kind of chat problem that is not evaluated. Templates name what was drawn ``{0}``, ``{1}``, …"""

    name: str
    draw: Callable[[random.Random], tuple[Any, ...]]
    questions: tuple[str, ...]
    program: str
    result: Callable[..., Any]
    in_head: bool = False
    """Whether a small model can learn to answer it without code."""


def _number(rng: random.Random, most: int = 12) -> int:
    digits = rng.randint(1, most)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _numbers(low: int, high: int | None = None, most: int = 8) -> Callable[[random.Random], tuple[int, ...]]:
    return lambda rng: tuple(_number(rng, most) for _ in range(rng.randint(low, high or low)))


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


def _assignments(rng: random.Random) -> tuple[Any, ...]:
    first, second = rng.sample("abcdefghkmnpqrstuvw", 2)
    return first, _number(rng, 9), second, _number(rng, 9)


SKILLS = (
    Skill("repeat", _numbers(1, most=12), ("Repeat {0}.", "Say the number {0}."), "print({0})", lambda a: a, True),
    Skill("show_two", _numbers(2), ("Show {0} and {1}.", "Write {0}, then {1}."), "print({0}, {1})",
          lambda a, b: f"{a} {b}", True),
    Skill("swap", _numbers(2), ("Show {0} and {1} the other way round.", "Write {1} after {0}, but last first."),
          "print({1}, {0})", lambda a, b: f"{b} {a}", True),
    Skill("show_three", _numbers(3, most=6), ("Show {0}, {1} and {2}.",), "print({0}, {1}, {2})",
          lambda a, b, c: f"{a} {b} {c}", True),
    Skill("pick_second", _numbers(3, most=6), ("What is in the middle of {0}, {1}, {2}?",), "print([{0}, {1}, {2}][1])",
          lambda a, b, c: b, True),
    Skill("join", _numbers(2, most=6), ("Glue {0} and {1} together.", "Write {0} and {1} without a gap."),
          "print(str({0}) + str({1}))", lambda a, b: f"{a}{b}", True),
    Skill("first_digit", _numbers(1, most=9), ("With which digit does {0} begin?",), "print(str({0})[0])",
          lambda a: str(a)[0], True),
    Skill("reverse", _numbers(1, most=9), ("Reverse {0}.", "Read {0} backwards."), "print(str({0})[::-1])",
          lambda a: str(a)[::-1]),
    Skill("least", _numbers(4, most=6), ("Which is the smallest of {0}, {1}, {2}, {3}?",),
          "print(min({0}, {1}, {2}, {3}))", min),
    Skill("sort", _numbers(3, most=5), ("Put {0}, {1} and {2} in order.", "Sort {0}, {1}, {2}."),
          "print(sorted([{0}, {1}, {2}]))", lambda *x: sorted(x)),
    Skill("binary", _numbers(1, most=5), ("Write {0} in binary.",), "print(bin({0}))", bin),
    Skill("hex", _numbers(1, most=9), ("Write {0} in base 16.", "What is {0} in hex?"), "print(hex({0}))", hex),
    Skill("octal", _numbers(1, most=8), ("Write {0} in base 8.",), "print(oct({0}))", oct),
    Skill("quotient", _numbers(2, most=7), ("How often does {1} fit into {0}?", "Divide {0} by {1}, rounding down."),
          "print({0} // {1})", lambda a, b: a // b),
    Skill("root", _numbers(1, most=9), ("What is the square root of {0}, rounded down?",),
          "import math\nprint(math.isqrt({0}))", math.isqrt),
    Skill("comb", lambda r: (r.randint(5, 30), r.randint(2, 5)), ("In how many ways can {1} of {0} be chosen?",),
          "import math\nprint(math.comb({0}, {1}))", math.comb),
    Skill("xor", _numbers(2, most=6), ("What is {0} xor {1}?",), "print({0} ^ {1})", lambda a, b: a ^ b),
    Skill("both_bits", _numbers(2, most=6), ("Which bits do {0} and {1} share?",), "print({0} & {1})",
          lambda a, b: a & b),
    Skill("either_bits", _numbers(2, most=6), ("What is {0} or {1}, bit by bit?",), "print({0} | {1})",
          lambda a, b: a | b),
    Skill("less", _numbers(2, most=7), ("Is {0} less than {1}?",), "print({0} < {1})", lambda a, b: a < b),
    Skill("same", lambda r: (lambda a: (a, a if r.random() < 0.5 else _number(r, 5)))(_number(r, 5)),
          ("Are {0} and {1} the same?",), "print({0} == {1})", lambda a, b: a == b),
    Skill("big_digit", _numbers(1, most=9), ("Which digit of {0} is the largest?",), "print(max(str({0})))",
          lambda a: max(str(a))),
    Skill("digits_up", _numbers(1, most=7), ("Put the digits of {0} in order.",), "print(sorted(str({0}))[::-1])",
          lambda a: sorted(str(a))[::-1]),
    Skill("place", lambda r: (_number(r, 3), _number(r, 2), r.randint(1, 99)),
          ("Start at {0} and go up in steps of {1}. Which number has place {2}?",),
          "print(range({0}, 10 ** 9, {1})[{2}])", lambda a, b, k: range(a, 10**9, b)[k]),
    Skill("list_ends", lambda r: (lambda a: (a, a + r.randint(20, 49), r.randint(0, 9)))(r.randint(10, 900)),
          ("Name the numbers from {0} to {1} that end in {2}.",),
          "print([n for n in range({0}, {1} + 1) if str(n)[-1] == str({2})])",
          lambda a, b, d: [n for n in range(a, b + 1) if str(n)[-1] == str(d)]),
    Skill("halve", _numbers(1, most=6), ("Halve {0} until it is below 10.",),
          "n = {0}\nwhile n > 9:\n n //= 2\nprint(n)", lambda a: _halve(a)),
    Skill("loop_show", lambda r: (_number(r, 4), r.randint(2, 4)), ("Say {0} in {1} lines.", "Print {0} {1} times."),
          "for i in range({1}):\n print({0})", lambda a, k: "\n".join([str(a)] * k)),
    Skill("assign", _assignments, ("Let {0} be {1} and {2} be {3}. Show {2}, then {0}.",),
          "{0} = {1}\n{2} = {3}\nprint({2}, {0})", lambda a, b, c, d: f"{d} {b}", True),
    Skill("nested", lambda r: tuple(_number(r, 2) for _ in range(6)),
          ("Make two rows: {0}, {1}, {2} and {3}, {4}, {5}. Show the second.",),
          "x = [{0}, {1}, {2}]\ny = [{3}, {4}, {5}]\nprint(y)", lambda *x: list(x[3:]), True),
    Skill("closest", lambda r: tuple(_number(r, 3) for _ in range(4)), ("Which of {1}, {2}, {3} is closest to {0}?",),
          "for d in range(1000):\n for n in [{1}, {2}, {3}]:\n  if n == {0} + d or n == {0} - d:\n   print(n)",
          lambda a, *x: _closest(a, x)),
    Skill("between", lambda r: (*(_number(r, 3) for _ in range(4)), r.randint(10, 300), r.randint(301, 990)),
          ("Which of {0}, {1}, {2}, {3} are over {4} and under {5}?",),
          "print([n for n in [{0}, {1}, {2}, {3}] if n > {4} and n < {5}])",
          lambda a, b, c, d, low, high: [n for n in [a, b, c, d] if low < n < high]),
    Skill("differ", lambda r: (lambda a, b, k: (a, r.randint(2, 99), b, b + k, a - k, k))(
              r.randint(100, 999), r.randint(2, 99), r.randint(2, 60)),
          ("Take one of {0} and {1} and one of {2}, {3} and {4} that differ by {5}.",),
          "for x in [{0}, {1}]:\n for y in [{2}, {3}, {4}]:\n  if x - y == {5}:\n   print(x, y)",
          lambda a, b, c, d, e, k: "\n".join(f"{x} {y}" for x in (a, b) for y in (c, d, e) if x - y == k)),
    Skill("rounded", _numbers(1, most=8), ("Round {0} to hundreds.",), "print(round({0}, -2))", lambda a: round(a, -2)),
    Skill("clock", _numbers(1, most=4), ("How many hours and minutes are {0} minutes?",), "print(divmod({0}, 60))",
          lambda a: divmod(a, 60)),
)  # fmt: skip


def _halve(n: int) -> int:
    while n > 9:
        n //= 2
    return n


def _closest(a: int, candidates: tuple[int, ...]) -> str:
    return "\n".join(str(n) for d in range(1000) for n in candidates if n in (a + d, a - d) or n == a + d)


def _ask(rng: random.Random, question: str) -> list[Message]:
    return prompt_messages(question)


def skill_chat(rng: random.Random, skill: Skill, *, with_code: bool, tools: bool) -> Conversation | None:
    """One chat about a skill, answered by code or in the head; None where the result is too long to be worth it."""
    drawn = skill.draw(rng)
    result = str(skill.result(*drawn))
    if len(result) > MAX_OUTPUT:
        return None
    messages = _ask(rng, rng.choice(skill.questions).format(*drawn))
    if with_code:
        thought = rng.choice(THOUGHTS)
        messages += [
            tool_call_message(thought, skill.program.format(*drawn)),
            {"role": "tool", "content": result},
            final_message(result),
        ]
    else:
        messages.append(final_message(result))
    return Conversation(id=skill.name, messages=messages, tools=tools)


def recall_chat(rng: random.Random, tools: bool) -> Conversation:
    """Who has what: find a number by a name, or a name by a number."""
    people = rng.sample(NAMES, rng.randint(2, 4))
    numbers = [_number(rng, 7) for _ in people]
    thing = rng.choice(THINGS)
    story = " ".join(f"{p} {rng.choice(VERBS)} {n} {thing}." for p, n in zip(people, numbers, strict=True))
    i = rng.randrange(len(people))
    if rng.random() < 0.5:
        question, answer = f"{story} What number goes with {people[i]}?", str(numbers[i])
    else:
        question, answer = f"{story} Who goes with {numbers[i]}?", people[i]
    return Conversation(id="recall", messages=[*_ask(rng, question), final_message(answer)], tools=tools)


def scattered(rng: random.Random, count: int) -> tuple[list[str], str]:
    """Numbers, and a text in which they stand between all kinds of signs and words: whoever can copy them from there
    does not depend on what a number's neighbours are."""
    numbers = [str(_number(rng, rng.choice((2, 9)))) for _ in range(count)]
    text = rng.choice(("", "", "(", "x", "n^", "to ", rng.choice(PLACES) + " "))
    for number in numbers[:-1]:
        text += number + rng.choice(SEPARATORS)
    return numbers, text + numbers[-1] + rng.choice(("", "", "x", ")", "y", "%", " " + rng.choice(THINGS)))


def numbers_chat(rng: random.Random, *, with_code: bool, tools: bool) -> Conversation:
    """Which numbers stand in a text: with a program that is really run, or directly."""
    numbers, text = scattered(rng, rng.randint(1, 6))
    result = f"[{', '.join(numbers)}]"
    messages = _ask(rng, rng.choice(("Which numbers stand in {}?", "List what {} holds.")).format(text))
    if with_code:
        messages += [
            tool_call_message(rng.choice(THOUGHTS), f"print({result})"),
            {"role": "tool", "content": result},
        ]
    return Conversation(id="numbers", messages=[*messages, final_message(result)], tools=tools)


def call_chat(rng: random.Random, tools: bool) -> Conversation:
    """Write a call of a made-up function, which is never run: numbers and names copied into Python."""
    name = _word(rng)
    args, text = scattered(rng, rng.randint(1, 6))
    how = "with"
    if rng.random() < 0.3:
        args.reverse()
        how = "backwards with"
    question = f"Write a call of {name} {how} {text}."
    if rng.random() < 0.3:
        lines = "\n".join(f"{name} = {name}.{rng.choice(VERBS)}({arg})" for arg in args)
        question = f"Write lines for {name} {how} {text}."
        answer = f"```python\n{lines}\n```"
    else:
        answer = f"```python\n{name}({', '.join(args)})\n```"
    messages = [*_ask(rng, question), {"role": "assistant", "content": answer}]
    return Conversation(id="call", messages=messages, tools=tools)


def story_text(rng: random.Random) -> str:
    """A few plain sentences."""
    if rng.random() < 0.15:
        return rng.choice(FACTS)
    person, thing, number = rng.choice(NAMES), rng.choice(THINGS), _number(rng, 6)
    sentences = [
        f"{person} {rng.choice(VERBS)} {number} {rng.choice(COLOURS)} {thing} at the {rng.choice(PLACES)}.",
        f"The {thing} of {person} are {rng.choice(COLOURS)} and there are {number} of them.",
        f"{rng.choice(NAMES)} asks how many {thing} {person} has, and {person} says {number}.",
        f"From the {rng.choice(PLACES)} to the {rng.choice(PLACES)} it is not far.",
        f"If the {rng.choice(PLACES)} is {rng.choice(COLOURS)}, then {rng.choice(NAMES)} is there.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def python_text(rng: random.Random) -> str:
    """A small Python function, never run."""
    f, x, y = _word(rng), rng.choice("abcn"), rng.choice("ikmx")
    value, small = _number(rng, 6), rng.randint(1, 9)
    bodies = (
        f"total = {small}\n    for {y} in range({x}):\n        total = total + {y} * {small}\n    return total",
        f"if {x} > {value}:\n        return {x} - {small}\n    return {value}",
        f"return [{y} * {y} for {y} in range({x}) if {y} != {small}]",
        f"while {x} > {small}:\n        {x} = {x} // {rng.randint(2, 9)}\n    return {x}",
        f"return sum(ord({y}) + {small} for {y} in {x})",
        f"return all({y} > {value} for {y} in {x}) and {x}[0] == {small}",
        f"for {y} in range(1, {value} + 1):\n        if {y} == {x}:\n            print({y})",
        f"import math\n    return math.floor({x} / {value})",
        f"return {{{x}: int({x}) ** {small} for {x} in str({value})}}",
    )
    return f"def {f}({x}):\n    {rng.choice(bodies)}\n"


def documents(seed: int | str) -> Iterator[Conversation | str]:
    """Documents for ever: conversations, and plain text as strings."""
    rng = random.Random(f"corpus/{seed}")
    head_skills = [skill for skill in SKILLS if skill.in_head]
    while True:
        kind = rng.random()
        tools = rng.random() < 0.6
        if kind < 0.56:
            chat = skill_chat(rng, rng.choice(SKILLS), with_code=True, tools=True)
            if chat is not None:
                yield chat
        elif kind < 0.66:
            yield numbers_chat(rng, with_code=True, tools=True)
        elif kind < 0.74:
            chat = skill_chat(rng, rng.choice(head_skills), with_code=False, tools=tools)
            if chat is not None:
                yield chat
        elif kind < 0.76:
            yield numbers_chat(rng, with_code=False, tools=tools)
        elif kind < 0.82:
            yield recall_chat(rng, tools)
        elif kind < 0.90:
            yield call_chat(rng, tools)
        elif kind < 0.95:
            yield story_text(rng)
        else:
            yield python_text(rng)
