"""The block's own source: which lines ran, what they name, and which others hide behind constants."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MODULE_STATE = frozenset(vars(nn.Module()))
DEPTH = 5  # of containers in containers
HARMLESS_CALLS = ("isinstance", "hasattr", "getattr", "len")
SIZES = ("shape", "ndim")
KINDS = ("dtype", "device", "is_cuda")  # a block is lifted for one dtype, in which it ran as well, and on one device


class Source:
    """Functions of the classes of a module and of its parts; torch's own are left out.

    Entering it records which of their lines run. unreadable: names of functions whose source cannot be read.
    """

    def __init__(self, module: nn.Module) -> None:
        self.functions: dict[CodeType, tuple[nn.Module, Any]] = {}
        self.owner: dict[CodeType, CodeType] = {}
        self.hit: dict[CodeType, set[int]] = {}
        self._trees: dict[CodeType, tuple[ast.AST, int] | None] = {}
        for part in module.modules():
            for cls in type(part).__mro__:
                if not cls.__module__.startswith("torch"):
                    for name, member in vars(cls).items():
                        self._add(part, name, member)
            for name, member in vars(part).items():
                self._add(part, name, member)

    def _add(self, part: nn.Module, name: str, member: Any) -> None:
        member = inspect.unwrap(member) if callable(member) else getattr(member, "__func__", None)
        if not inspect.isfunction(member) or (name.startswith("__") and name != "__call__"):
            return
        if member.__code__.co_filename.startswith(torch.__path__[0]):
            return
        self.functions[member.__code__] = (part, member)
        todo = [member.__code__]
        while todo:  # nested functions and comprehensions count for their owner
            code = todo.pop()
            self.owner[code] = member.__code__
            todo += [c for c in code.co_consts if inspect.iscode(c)]

    def __enter__(self) -> Source:
        def inside(frame: FrameType, event: str, arg: Any) -> Any:
            self.hit.setdefault(self.owner[frame.f_code], set()).add(frame.f_lineno)
            return inside

        self._before = sys.gettrace()
        sys.settrace(lambda f, event, arg: inside(f, event, arg) if f.f_code in self.owner else None)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self._before)

    def surroundings(self) -> dict[str, str]:
        """Mutable things outside the instance that its code names, as text: globals, and attributes of its classes."""
        found: dict[str, str] = {}
        for code, (_, function) in self.functions.items():
            for name in code.co_names:
                value = function.__globals__.get(name)
                if isinstance(value, dict | list | set | Tensor | np.ndarray):
                    found[f"global {name}"] = repr(value)
        for part in {type(p) for p, _ in self.functions.values()}:
            for cls in part.__mro__:
                if cls.__module__.startswith("torch"):
                    continue
                for name, value in vars(cls).items():
                    if isinstance(value, dict | list | set | Tensor | int | float) and not name.startswith("__"):
                        found[f"{cls.__name__}.{name}"] = repr(value)
        return found

    def attributes_read(self) -> set[str]:
        """Attributes of self that some function reads (an augmented assignment reads its target)."""
        found: set[str] = set()
        for code in self.functions:
            tree = self._tree(code)
            for node in ast.walk(tree[0]) if tree else ():
                target = node.target if isinstance(node, ast.AugAssign) else node
                read = isinstance(node, ast.AugAssign) or isinstance(getattr(node, "ctx", None), ast.Load)
                if read and isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    found.add(target.attr)
        return found

    def integers(self) -> set[int]:
        """Integers above 2 in the code, its globals, defaults and classes, and anywhere in the plain attributes."""
        found: set[int] = set()
        for code, (part, function) in self.functions.items():
            _collect(code.co_consts, found)
            _collect([function.__globals__[n] for n in code.co_names if n in function.__globals__], found)
            _collect([function.__defaults__, function.__kwdefaults__], found)
            _collect([inspect.getclosurevars(function).nonlocals], found)
            _collect([v for n, v in vars(part).items() if n not in MODULE_STATE], found)
            for cls in type(part).__mro__:
                if not cls.__module__.startswith("torch"):
                    _collect([v for n, v in vars(cls).items() if not n.startswith("__")], found)
        return found

    def unreadable(self) -> list[str]:
        """Functions that ran and whose source is not there."""
        return [self.functions[c][1].__qualname__ for c in self.hit if self._tree(c) is None]

    def num_lines(self) -> int:
        """Lines of the functions that ran, whether or not each of them did."""
        return sum(len({line for *_, line in code.co_lines() if line}) for code in self.hit)

    def executed(self) -> dict[str, frozenset[int]]:
        """Lines that ran, by function."""
        return {self.functions[c][1].__qualname__: frozenset(lines) for c, lines in self.hit.items()}

    def missed(self) -> list[tuple[str, bool]]:
        """Statements that never ran: "function:line text", and whether a test of constants explains it."""
        found = []
        for code, lines in self.hit.items():
            known = self._tree(code)
            if known is None:
                continue
            tree, start = known
            function = self.functions[code][1]
            parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
            top = tree.body[0]  # type: ignore[attr-defined]
            for statement in ast.walk(top):
                if not _counts(statement, top):
                    continue
                span = range(statement.lineno + start - 1, statement.end_lineno + start)  # type: ignore[attr-defined]
                if not lines.isdisjoint(span):
                    continue
                text = f"{function.__qualname__}:{span.start} {ast.unparse(statement)[:60]!r}"
                found.append((text, _explained(statement, parents, top, function)))
        return found

    def _tree(self, code: CodeType) -> tuple[ast.AST, int] | None:
        if code not in self._trees:
            try:
                lines, start = inspect.getsourcelines(self.functions[code][1])
                tree = ast.parse(textwrap.dedent("".join(lines)))
                readable = bool(tree.body) and isinstance(tree.body[0], ast.FunctionDef)
                self._trees[code] = (tree, start) if readable else None
            except (OSError, TypeError, SyntaxError):
                self._trees[code] = None
        return self._trees[code]


def _collect(value: Any, found: set[int], depth: int = 0) -> None:
    """Integers above 2 in a value, its items and its attributes."""
    if isinstance(value, int):
        found |= {value} if value > 2 else set()
    elif depth == DEPTH or isinstance(value, str | type | nn.Module | Tensor | np.ndarray):
        return
    elif inspect.iscode(value):
        _collect(value.co_consts, found, depth + 1)
    elif isinstance(value, dict | list | tuple | set | frozenset):
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, found, depth + 1)
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not callable(value):
        _collect(vars(value), found, depth + 1)


def _counts(node: ast.AST, top: ast.AST) -> bool:
    """A statement that does something when it runs."""
    if not isinstance(node, ast.stmt) or node is top:
        return False
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Pass | ast.Global | ast.Nonlocal | ast.Continue):
        return False
    return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _explained(statement: ast.stmt, parents: dict[ast.AST, ast.AST], top: Any, function: Any) -> bool:
    """Whether a statement that never ran is a raise, an assert, a handler, or behind a test of constants."""
    if isinstance(statement, ast.Raise):
        return True
    arguments = top.args
    defaults = {a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]}
    defaults |= {a.arg for a in arguments.kwonlyargs}
    node: ast.AST = statement
    while node in parents:
        parent = parents[node]
        if isinstance(parent, ast.ExceptHandler | ast.Assert):
            return True
        if (
            isinstance(parent, ast.If | ast.While)
            and node is not parent.test
            and _constant(parent.test, defaults, function)
        ):
            return True
        node = parent
    return False


def _constant(test: ast.expr, defaults: set[str], function: Any) -> bool:
    """Whether a test reads only self, globals and arguments with defaults."""
    every = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else []
    if any(isinstance(v, ast.Attribute) and v.attr == "is_cuda" for v in every):
        return True  # no other operand matters where the rows are on the CPU
    nodes = list(_parts(test))
    for node in nodes:
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in HARMLESS_CALLS):
            return False
        if isinstance(node, ast.Attribute) and node.attr in SIZES:
            return False
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    first = function.__code__.co_varnames[:1]
    known = {*defaults, *HARMLESS_CALLS, *first, *function.__globals__}
    return names <= known


def _parts(test: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a test, but not what stands in front of a dtype or a device."""
    yield test
    if not (isinstance(test, ast.Attribute) and test.attr in KINDS):
        for child in ast.iter_child_nodes(test):
            yield from _parts(child)
