"""GSM8K's annotated solutions as conversations with code.

The annotated solutions mark every calculation: ``<<48/2=24>>24``. A conversation makes one program of a solution's
calculations, whose steps use the results of earlier steps by name: only someone who had already worked them out could
write a program that spelled them out.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from retool.data.problem import Problem
from retool.data.prompts import prompt_messages
from retool.formats.calls import tool_call
from retool.types import Conversation, Message

PLAN = "I compute the steps with code."
MAX_POWER = 64
"""Larger exponents do not occur in the data; without a bound one typing error could take all memory."""

FLOAT_NOISE = Decimal("1e-9")
"""0.1 * 30 is 3.0000000000000004; the data's numbers are far coarser than this."""

_ANNOTATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_LITERAL = re.compile(r"(?<![\w.])\d+(?:\.\d*)?|(?<![\w.])\.\d+")
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class UnfitError(Exception):
    """A solution that gives no sound conversation; says why."""


def split_solution(text: str) -> tuple[str, str]:
    """A published solution and its answer, the number behind ``####`` without thousands separators.

    Raises:
        UnfitError: there is no such number.
    """
    solution, marker, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker:
        raise UnfitError("'answer' has no '####'; end it with a line '#### N'")
    if not _NUMBER.fullmatch(answer):
        raise UnfitError(f"{answer!r} after '####' is not a number; write digits alone")
    return solution.strip(), answer


def convert(problems: Iterable[Problem]) -> tuple[list[Conversation], Counter[str]]:
    """The conversations of the problems whose solutions fit, and how many others there are for each reason."""
    conversations, unfit = [], Counter[str]()
    for problem in problems:
        try:
            conversations.append(Conversation(problem.id, _converse(problem)))
        except UnfitError as reason:
            unfit[str(reason)] += 1
    return conversations, unfit


def _converse(row: Problem) -> list[Message]:
    """The chat: the plan and one call, what the code prints, the solution's prose with its answer in a box.

    Raises:
        UnfitError: says why.
    """
    code, outputs = _program(row)
    prose = _ANNOTATION.sub("", row.solution)
    return [
        *prompt_messages(row.question),
        {"role": "assistant", "content": PLAN, "tool_calls": [tool_call(code)]},
        {"role": "tool", "content": "\n".join(outputs)},
        {"role": "assistant", "content": f"{prose}\n\\boxed{{{row.answer}}}"},
    ]


def _program(row: Problem) -> tuple[str, list[str]]:
    """The solution's calculations as one program that prints each result, and what it prints.

    A number that the question does not give, and that an earlier step claims as its result, is that result.
    """
    steps = _ANNOTATION.findall(row.solution)
    if not steps:
        raise UnfitError("without an annotated calculation")
    if "<<" in _ANNOTATION.sub("", row.solution):
        raise UnfitError("with an annotation that is no calculation")
    given = {Decimal(text) for text in _LITERAL.findall(re.sub(r"(?<=\d),(?=\d{3})", "", row.question))}
    values: dict[str, float] = {}
    claims: dict[Decimal, str] = {}
    lines, outputs = [], []
    for expression, claimed in steps:
        claim = claimed.strip().replace(",", "")
        if not _NUMBER.fullmatch(claim):
            raise UnfitError("whose result is not a number")
        name = f"s{len(values) + 1}"
        source = _LITERAL.sub(lambda match: _operand(match.group(), given, claims), expression.replace(",", ""))
        source = re.sub(r"\s+", "", source)
        values[name] = _evaluate(source, values)
        if not _agrees(values[name], claim):
            raise UnfitError("whose result differs from its annotation")
        claims[Decimal(claim)] = name
        lines += [f"{name} = {source}", f"print({name})"]
        outputs.append(str(values[name]))
    if not _agrees(values[name], row.answer):
        raise UnfitError("whose last result is not the answer")
    return "\n".join(lines), outputs


def _operand(text: str, given: set[Decimal], claims: dict[Decimal, str]) -> str:
    value = Decimal(text)
    if value in claims and value not in given:
        return claims[value]
    # Python takes no integer with a leading zero, and the data writes ".5" and "5.".
    whole, point, decimals = text.partition(".")
    return (whole.lstrip("0") or "0") + (point + decimals if decimals else "")


def _evaluate(source: str, values: dict[str, float]) -> float:
    """What Python gives for an arithmetic expression of numbers and names, and for nothing else.

    Raises:
        UnfitError: the expression is anything more, or has no value.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > MAX_POWER:
                raise UnfitError("with an enormous power")
            return _BINARY[type(node.op)](left, right)
        raise UnfitError("whose calculation is not plain arithmetic")

    try:
        result = value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        raise UnfitError("whose calculation is not plain arithmetic") from None
    if isinstance(result, complex):
        raise UnfitError("whose result is not a number")
    return float(result) if isinstance(result, float) else int(result)


def _agrees(value: float, claim: str) -> bool:
    """Whether ``claim`` is ``value``, rounded or cut to the decimals that it shows; a whole number must be exact."""
    decimals = len(claim.partition(".")[2])
    return abs(Decimal(value) - Decimal(claim)) < (Decimal(1).scaleb(-decimals) if decimals else FLOAT_NOISE)
