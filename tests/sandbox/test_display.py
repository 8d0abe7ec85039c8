import builtins
import contextlib
import io

import pytest

from retool.sandbox.display import compile_program


def shown(source: str) -> str:
    namespace = {"__builtins__": builtins, "__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for part in compile_program(source, "<code>"):
            exec(part, namespace)
    return output.getvalue()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx * 2\n", "6\n"),
        ("'a'", "'a'\n"),
        ("None", ""),
        ("print('a')", "a\n"),
        ("5\nx = 1", ""),
        ("x = 1; x", "1\n"),
        ("(1,\n 2)  # last", "(1, 2)\n"),
        ("def f():\n    return 4\nf()", "4\n"),
        ("if True:\n    7", ""),
        ("[\n1\n]\n\n\n# end\n", "[1]\n"),
        ("print(1)\nprint(2)\n3", "1\n2\n3\n"),
        ("from __future__ import annotations\n(lambda: 1)()", "1\n"),
        ("if __name__ == '__main__':\n    print('main')", "main\n"),
        ("'# not a comment\\n5'", "'# not a comment\\n5'\n"),
        ("", ""),
        ("# only a comment", ""),
    ],
)
def test_last_expression_is_shown(source: str, expected: str) -> None:
    assert shown(source) == expected


def test_future_statement_holds_for_the_last_line() -> None:
    # Under barry_as_FLUFL `<>` is the only inequality, and `!=` is a syntax error.
    assert shown("from __future__ import division, annotations\n1 / 2") == "0.5\n"
    source = "from __future__ import annotations\nx: undefined = 1\nx"
    assert shown(source) == "1\n"


def test_namespace_gets_no_foreign_name() -> None:
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for part in compile_program("a = 1\na", "<code>"):
            exec(part, namespace)
    assert set(namespace) == {"a", "__builtins__"}


def test_deep_expression_still_runs() -> None:
    source = "x = " + "+".join(["1"] * 2000) + "\nprint(x)"
    assert shown(source) == "2000\n"


def test_wrong_source_raises() -> None:
    with pytest.raises(SyntaxError):
        compile_program("x = = 1", "<code>")
    with pytest.raises(UnicodeEncodeError):
        compile_program("x = '\ud800'", "<code>")
