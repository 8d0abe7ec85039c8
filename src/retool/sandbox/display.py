"""Show the value of a program's last bare expression, as a notebook does, by its syntax tree and never its text."""

from __future__ import annotations
import __future__

import ast
from types import CodeType

_FUTURE = 0
for _name in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _name).compiler_flag


def compile_program(source: str, filename: str) -> list[CodeType]:
    """Compile ``source`` into code objects to run in order in one namespace.

    A last statement that is a bare expression becomes a code object of its own that hands its value to
    ``sys.displayhook``, which prints the ``repr`` of anything but None. No name is added to the namespace.

    Raises:
        SyntaxError: the source is not Python.
        ValueError: the source holds NUL bytes (Python 3.11), or lone surrogates (UnicodeEncodeError).
    """
    try:
        tree = ast.parse(source, filename)
        if not tree.body or not isinstance(tree.body[-1], ast.Expr):
            return [compile(tree, filename, "exec", dont_inherit=True)]
        last = ast.Interactive([tree.body.pop()])
        body = compile(tree, filename, "exec", dont_inherit=True)
        # The future statements of the body hold for its last line too.
        return [body, compile(last, filename, "single", body.co_flags & _FUTURE, dont_inherit=True)]
    except RecursionError:
        # Trees that are too deep to travel through Python objects may still compile inside C; the value is not shown.
        return [compile(source, filename, "exec", dont_inherit=True)]
