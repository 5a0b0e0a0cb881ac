"""TuneError: a tuning run, a tuning database or a file of results is at fault; every message is one line."""

from moec.compiler.errors import CompileError


class TuneError(CompileError):
    """Tuning cannot go on as asked."""


class DatabaseError(TuneError):
    """A tuning database cannot be opened, read or written."""


class ResultsError(TuneError):
    """A file of tuning results is damaged, of another format, or says what has no meaning here."""
