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
1. Every program is complete by itself: it imports what it uses, defines every name, and prints what is needed. Nothing
   is carried over from an earlier program.
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

Write the example only: no title, no remark about these rules, no fence around the whole."""

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


def messages_for(problem: Problem) -> list[Message]:
    """The chat that asks for one example. Without a solution the answer is not told either: the teacher finds it."""
    asked = REWRITE if problem.solution else SOLVE
    # In one pass: a problem may hold "{answer}" itself.
    values = {"question": problem.question, "answer": problem.answer, "solution": _ANNOTATION.sub("", problem.solution)}
    filled = re.sub(r"\{(question|answer|solution)\}", lambda match: values[match[1]], asked)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": filled}]


def fingerprint() -> str:
    """Changes whenever the words do, so that answers to different prompts are never mixed."""
    return hashlib.blake2b("\0".join([SYSTEM, REWRITE, SOLVE]).encode(), digest_size=8).hexdigest()
