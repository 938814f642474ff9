"""What a model gave as its answer, read exactly: numbers and arithmetic expressions, from hostile texts.

Every text is measured before it is read, and nothing in it is ever run: what comes from a model under training is
whatever raises its reward.
"""

import ast
import re
from fractions import Fraction
from typing import NamedTuple

from dsjax.checks import MOST_NUMBERS

LONGEST_NUMBER = 100  # characters
LONGEST_EXPRESSION = 1_000  # characters

# ASCII digits only: \d takes those of other scripts too.
NUMBER = re.compile(
    r"(?P<minus>-?)\$?(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<decimals>\.[0-9]+)?)(?:/(?P<below>[0-9]+))?%?"
)
DIGITS = re.compile(r"[0-9]+")
SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class Expression(NamedTuple):
    """An arithmetic expression, evaluated."""

    value: Fraction
    numbers: list[int]  # sorted, each as often as it stands there
    steps: list[str]  # "3+7=10", innermost first


def number(text: str) -> Fraction | None:
    """The number that `text` is, exactly; None where it is none.

    `18`, `-3`, `0.50`, `.5`, `3/4` and `1,000` are numbers; a dollar sign before, a percent sign or a full stop behind
    are left out, so that `50%` is 50. Exponents, other currencies, other scripts' digits and anything longer than
    LONGEST_NUMBER are not.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    found = NUMBER.fullmatch(text.strip().removesuffix("."))
    if not found or not (found["whole"] or found["decimals"]):
        return None
    if found["below"] and (found["decimals"] or not int(found["below"])):
        return None
    value = Fraction((found["whole"] or "0").replace(",", "") + (found["decimals"] or "")) / int(found["below"] or 1)
    return -value if found["minus"] else value


def expression(text: str) -> Expression | None:
    """The value of an expression of whole numbers, `+ - * /` and parentheses; None where `text` is no such thing.

    Signs before a number, powers, whole division, names, calls and division by zero are not; nor is what is longer than
    LONGEST_EXPRESSION or has more than MOST_NUMBERS numbers.
    """
    if len(text) > LONGEST_EXPRESSION or not set(text := text.strip()) <= set("0123456789+-*/() "):
        return None
    digits = DIGITS.findall(text)
    # Bounds the depth of the recursion below and the size of the value as well.
    if len(digits) > MOST_NUMBERS:
        return None
    steps: list[str] = []
    try:
        value = _value(ast.parse(text, mode="eval").body, steps)
    # The parser tells too many parentheses as a MemoryError or RecursionError, depending on the version of Python.
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None
    return Expression(value, sorted(map(int, digits)), steps)


def _value(node: ast.expr, steps: list[str]) -> Fraction:
    """The value of a syntax tree of whole numbers and the four operations. Raises ValueError for any other node."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in SYMBOLS:
        raise ValueError(type(node).__name__)
    left, right = _value(node.left, steps), _value(node.right, steps)
    symbol = SYMBOLS[type(node.op)]
    match symbol:
        case "+":
            value = left + right
        case "-":
            value = left - right
        case "*":
            value = left * right
        case _:
            value = left / right
    steps.append(f"{left}{symbol}{right}={value}")
    return value
