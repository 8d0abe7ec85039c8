"""Import the preload list and call it once: many libraries fill tables and caches, and import the rest of themselves,
on the first call. Measured: a sympy run costs 5–6 ms of CPU after such calls and 28 ms without.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

from collections.abc import Iterable

WARM_UPS = {
    "numpy": """
import numpy as m
m.linalg.solve(m.eye(2), m.ones(2)); m.random.rand(2); repr(m.arange(3.0)); m.fft.fft([1])
""",
    "sympy": """
import sympy as m
x, y = m.symbols("x y")
repr(m.solve(x**2 - 3*x + 2, x)); m.solve([x + y - 2, x - y], [x, y]); m.factor(x**2 - 1); m.expand((x + 1)**3)
m.simplify(m.sin(x)**2 + m.cos(x)**2); m.integrate(x*m.exp(x), x); m.diff(m.sin(x)/x, x); m.limit(m.sin(x)/x, x, 0)
m.summation(x, (x, 1, y)); m.Matrix([[1, 2], [3, 4]]).inv(); m.Rational(1, 3) + m.sqrt(2); m.N(m.pi, 20)
m.factorint(360); m.factorint(2**67 - 1); m.isprime(97); m.isprime(10**18 + 9)
m.binomial(9, 3); m.sympify("x + 1"); m.nsimplify(0.5); m.latex(x**2)
""",
    "scipy": """
import scipy.integrate, scipy.optimize, scipy.special
scipy.optimize.minimize_scalar(lambda x: (x - 1) ** 2)
""",
    "fractions": """
from fractions import Fraction
str(Fraction(1, 3) + Fraction("1/2"))
""",
    "decimal": """
from decimal import Decimal
str(Decimal(2).sqrt())
""",
}
"""By top-level package; what a short program about numbers is likely to call."""

_REASON_CHARS = 200


def load(modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Import ``modules`` and warm them up; which were loaded, and which not, each with the reason."""
    loaded, skipped = [], []
    for name in modules:
        try:
            __import__(name)
            exec(WARM_UPS.get(name.split(".")[0], ""), {})
            loaded.append(name)
        except BaseException as error:
            # Whatever a library does at import, SystemExit included, costs its own preload only.
            skipped.append(f"{name}: {type(error).__name__}: {error}"[:_REASON_CHARS])
    return loaded, skipped
