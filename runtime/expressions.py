"""Sizes as functions of a program's symbols: "2*T", "T*8 + 1", "min(T, 64)//16".

A size in a program is an int or a text. Texts are read by Python's own parser and accepted only if they hold nothing
but whole numbers, known symbols, + - * // %, min and max; anything else is an error: a program file holds no code.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Collection

from moec.runtime.errors import FormatError

Size = int | str
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
_FUNCTIONS = ("min", "max")


def to_source(size: Size, symbols: Collection[str]) -> str:
    """The size as Python source over the symbols' names, every operation in parentheses.

    Raises: FormatError: the text holds anything but the grammar above.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return str(size) if size >= 0 else f"({size})"
    try:
        tree = ast.parse(size, mode="eval") if isinstance(size, str) else None
    except (SyntaxError, TypeError, ValueError) as error:
        raise FormatError(f"size {size!r} in program.json is not an expression; make the engine again") from error
    if tree is None:
        raise FormatError(f"size {size!r} in program.json is neither a whole number nor an expression")
    return _source(tree.body, size, symbols)


def evaluate(size: Size, values: dict[str, int]) -> int:
    """The size's value where every symbol has one. Raises: FormatError as to_source; ZeroDivisionError."""
    if isinstance(size, int):
        return size
    return int(eval(to_source(size, values), {"__builtins__": {}, "min": min, "max": max}, dict(values)))


@functools.lru_cache(maxsize=1024)
def compiled(sizes: tuple[Size, ...], symbols: tuple[str, ...]) -> Callable[..., list[int]]:
    """A function of the symbols' values, by name, that gives all sizes. Raises: FormatError as to_source."""
    body = ", ".join(to_source(size, symbols) for size in sizes)
    function = eval(f"lambda {', '.join(symbols)}: [{body}]", {"__builtins__": {}, "min": min, "max": max})
    return function  # type: ignore[no-any-return]


def _source(node: ast.expr, text: Size, symbols: Collection[str]) -> str:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return str(node.value)
    if isinstance(node, ast.Name) and node.id in symbols:
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return f"(-{_source(node.operand, text, symbols)})"
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _source(node.left, text, symbols), _source(node.right, text, symbols)
        return f"({left} {_OPERATORS[type(node.op)]} {right})"
    if isinstance(node, ast.Call) and (name := _function_name(node)):
        return f"{name}({', '.join(_source(a, text, symbols) for a in node.args)})"
    raise FormatError(
        f"size {text!r} in program.json uses more than {' '.join(_OPERATORS.values())} min max and {list(symbols)}"
    )


def _function_name(call: ast.Call) -> str | None:
    """min or max where that is what is called, with plain arguments."""
    if not isinstance(call.func, ast.Name) or call.keywords or not call.args:
        return None
    return call.func.id if call.func.id in _FUNCTIONS else None
