"""Sizes as polynomials in the symbols with whole coefficients: how two sizes compare for every value of the symbols."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping

Size = int | str
Monomial = tuple[str, ...]  # sorted factors; () is the constant term


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """Sum of coefficient * product of factors. Factors are symbols, or expressions that are no polynomial ("T//2")."""

    terms: Mapping[Monomial, int]

    @classmethod
    def of(cls, size: Size) -> Polynomial:
        """Reads an int, or a text of + and * over names and numbers; any other part of it becomes one factor.

        Raises: SyntaxError: the text is no expression.
        """
        if isinstance(size, int):
            return cls({(): size} if size else {})
        return _read(ast.parse(size, mode="eval").body)

    def join(self, other: Polynomial) -> Polynomial:
        """The greater coefficient of each term: at least as large as both wherever the factors are not negative."""
        keys = {**self.terms, **other.terms}
        return Polynomial({k: max(self.terms.get(k, 0), other.terms.get(k, 0)) for k in keys})

    def plus(self, other: Polynomial) -> Polynomial:
        """The sum; terms whose coefficients cancel stay, as zeros."""
        keys = {**self.terms, **other.terms}
        return Polynomial({k: self.terms.get(k, 0) + other.terms.get(k, 0) for k in keys})

    def times(self, other: Polynomial) -> Polynomial:
        """The product, multiplied out."""
        terms: dict[Monomial, int] = {}
        for a, x in self.terms.items():
            for b, y in other.terms.items():
                key = tuple(sorted((*a, *b)))
                terms[key] = terms.get(key, 0) + x * y
        return Polynomial(terms)

    def rounded_up(self, unit: int) -> Polynomial:
        """Every coefficient at the next multiple of `unit`, so that the value is one too."""
        return Polynomial({k: -(-c // unit) * unit for k, c in self.terms.items()})

    def value(self, symbols: Mapping[str, int]) -> int:
        """Raises: KeyError, NameError: a symbol is missing."""
        total = 0
        for factors, coefficient in self.terms.items():
            for factor in factors:
                coefficient *= _number(ast.parse(factor, mode="eval").body, symbols)
            total += coefficient
        return total

    @property
    def size(self) -> Size:
        """As an int or a text: "128*T + 64", terms with more factors first."""
        terms = sorted(((k, c) for k, c in self.terms.items() if c), key=lambda t: (-len(t[0]), t[0]))
        if all(not k for k, _ in terms):
            return terms[0][1] if terms else 0
        return " + ".join("*".join([str(c)] * (c != 1 or not k) + list(k)) for k, c in terms)


def _read(node: ast.expr) -> Polynomial:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Polynomial({(): node.value} if node.value else {})
    if isinstance(node, ast.Name):
        return Polynomial({(node.id,): 1})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _read(node.left).plus(_read(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _read(node.left).times(_read(node.right))
    return Polynomial({(f"({ast.unparse(node)})",): 1})


_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_FUNCTIONS = {"min": min, "max": max}


def _number(node: ast.expr, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_number(node.left, symbols), _number(node.right, symbols))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, symbols)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](_number(a, symbols) for a in node.args)
    raise ValueError(f"the size {ast.unparse(node)!r} uses more than + - * // % min max, names and whole numbers")
