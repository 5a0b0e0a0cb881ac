"""PassError: one of our passes broke an invariant; and what foreign errors say, in one line."""

from __future__ import annotations


class PassError(Exception):
    """A pass produced a graph that is wrong; the message names the pass, the layer and the site."""


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What another's error says behind its type's name, white space folded, at most so many characters of it."""
    text = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
