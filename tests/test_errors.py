from __future__ import annotations

import inspect
import re

import pytest

from retool import errors

CLASSES = {name: member for name, member in vars(errors).items() if inspect.isclass(member)}


def drawn_tree() -> dict[str, str]:
    """Each class in the docstring's drawing with the one it hangs under."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([\s│├└─]*)(\w+(?:Error|Refused|Broken))\b", line)
        if match is None:
            continue
        depth = len(match.group(1))
        while path and path[-1][0] >= depth:
            path.pop()
        parents[match.group(2)] = path[-1][1] if path else "Exception"
        path.append((depth, match.group(2)))
    return parents


def test_the_drawing_is_the_tree() -> None:
    assert drawn_tree() == {name: member.__base__.__name__ for name, member in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_ours_and_explained(name: str) -> None:
    assert issubclass(CLASSES[name], errors.ReToolError)
    assert CLASSES[name].__doc__


def test_the_four_kinds_exclude_each_other() -> None:
    """The user's mistake, the machine's fault, a run's own end and our bug are answered differently: none may pass for
    another."""
    kinds = (errors.UserError, errors.InfraError, errors.HealthError, errors.InvariantError)
    for member in CLASSES.values():
        assert sum(issubclass(member, kind) for kind in kinds) == (0 if member is errors.ReToolError else 1)
