"""What the teacher is asked, in our own words, after the description in ReTool's figure 8: take a solution in prose,
replace the calculations that gain from code by a program and what it prints, leave the rest as it is."""

from __future__ import annotations

import hashlib
import re

from retool.data.problem import Problem
from retool.types import Message

SYSTEM = r"""You write training examples for a model that learns to reason with a Python interpreter at hand. Each
example is one worked solution, in prose, in which some of the work is done by short programs.

How a program is written. Put it between tags, in a fenced block, and write what it prints directly after it:

<code>
```python
print(17 * 23)
```
</code>

<interpreter>
391
</interpreter>

Rules:
1. {carried}
2. The text between <interpreter> and </interpreter> is exactly what the program prints, no more and no less. Every
   program will be run, and an example whose written output is not the real one is thrown away. If you cannot know an
   output for sure, write a program whose output you do know.
3. After each output the prose goes on from it: it says what the number means, checks it, or uses it.
4. Use code where it earns its place: arithmetic with many digits, long sums, case checks, search, equations, exact
   fractions, number theory. Leave plain reasoning in prose, and do not use code for what is obvious.
5. Do not use <code>, <interpreter> or <answer> for anything else, and no other tags.
6. End with the final answer, alone in its box:

<answer>
\boxed{391}
</answer>

Write the example only: no title, no remark about these rules, no fence around the whole. It would look like this for
the problem "How many positive integers up to 1000 are multiples of 3 or of 5, but not of 15?", whose solution in prose
says "There are 333 multiples of 3, 200 of 5 and 66 of 15. The 66 are counted in both of the others, so the answer is
333 + 200 - 2 * 66 = 401":

A multiple of 15 is a multiple of both 3 and 5, so it is counted in both groups and has to leave both. I let a program
count each group and combine them.

<code>
```python
limit = 1000
threes, fives, fifteens = limit // 3, limit // 5, limit // 15
print(threes, fives, fifteens)
print(threes + fives - 2 * fifteens)
```
</code>

<interpreter>
333 200 66
401
</interpreter>

There are 333 multiples of 3, 200 of 5 and 66 of 15. Without the 66 in both groups, 401 integers are left.

<answer>
\boxed{401}
</answer>"""

ALONE = """Every program is complete by itself: it imports what it uses, defines every name, and prints what is needed.
   Nothing is carried over from an earlier program."""

CARRIED = """The programs of one example run in one interpreter, one after the other: what an earlier one imported or
   defined is still there. Each prints what is needed."""

REWRITE = r"""Problem:
{question}

A correct solution in prose, with the answer {answer}:
{solution}

Rewrite this solution as an example. Keep its line of thought and its words where they are good; replace each
calculation that gains from it by a program and its output; leave out nothing that the argument needs."""

SOLVE = r"""Problem:
{question}

Solve it as an example, thinking step by step."""


_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's marks of a calculation, which stands beside them in words


def messages_for(problem: Problem, *, stateful: bool = False) -> list[Message]:
    """The chat that asks for one example. Without a solution the answer is not told either: the teacher finds it.

    Args:
        stateful: the programs of one answer share an interpreter.
    """
    asked = REWRITE if problem.solution else SOLVE
    # In one pass: a problem may hold "{answer}" itself.
    values = {"question": problem.question, "answer": problem.answer, "solution": _ANNOTATION.sub("", problem.solution)}
    filled = re.sub(r"\{(question|answer|solution)\}", lambda match: values[match[1]], asked)
    system = SYSTEM.replace("{carried}", CARRIED if stateful else ALONE)
    return [{"role": "system", "content": system}, {"role": "user", "content": filled}]


def fingerprint() -> str:
    """Changes whenever the words do, so that answers to different prompts are never mixed."""
    words = "\0".join([SYSTEM, ALONE, CARRIED, REWRITE, SOLVE])
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
