"""What a measuring process is told to measure, and what it must be able to do with it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Protocol

from moec.compiler.tune.record import Config

Call = Callable[[], Any]


class Subject(Protocol):
    """Something with configurations. It lives in the measuring process alone."""

    def prepare(self, task: dict[str, Any]) -> None:
        """Makes inputs and references for a task; called before the candidates of a task, more than once."""

    def build(self, config: Config) -> Any:
        """A candidate that `call` takes. Raises: anything: the candidate cannot be built."""

    def check(self, candidate: Any, seed: int) -> str:
        """Runs the candidate on inputs of a seed -> what is wrong with its result, or "" ."""

    def call(self, candidate: Any, seed: int) -> Call:
        """What is timed: a call without arguments, its inputs made already and of this seed alone."""


@dataclasses.dataclass(frozen=True)
class SubjectSpec:
    """How a measuring process makes its subject: module:function, called with the arguments (JSON values)."""

    factory: str
    arguments: dict[str, Any]

    def make(self) -> Subject:
        """The subject. Raises: ImportError, AttributeError: no such factory."""
        module, _, name = self.factory.partition(":")
        made: Subject = getattr(importlib.import_module(module), name)(**self.arguments)
        return made
