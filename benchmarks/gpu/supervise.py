"""Layers measured in a process of its own, which is ended when it hangs: a bad kernel costs its own layer alone.

An illegal access fails every later launch of its process, and a kernel that waits for ever ends nothing by itself. The
process tells what it does as JSON, a line for each event, and owes a line within a limit.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moec.compiler.tune.runner.main import Child

Event = dict[str, Any]
"""{"begin": layer} and {"end": layer}, and whatever lies between or before; {"end"} alone is a layer left out."""


def supervise(command: Callable[[list[int]], Sequence[str]], layers: Sequence[int], limit_s: float) -> Iterator[Event]:
    """The events of all layers, in as many processes as it takes. command: of a process for the layers given.

    A layer whose process crashed, or was silent for limit_s seconds, gets {"fault": why} and {"end": layer}; the next
    process goes on after it. One that ends where no layer has begun is not started again: {"failed": its exit code}.
    """
    left = list(layers)
    while left:
        child, begun, reason = Child(command(left)), None, ""
        try:
            while (event := child.next(limit_s)) is not None:
                begun = event.get("begin", begun)
                if "end" in event:
                    left.remove(event["end"])
                    begun = None
                yield event
            reason = f"its process ended with code {child.wait()}"
        except queue.Empty:
            reason = f"it hangs: nothing was heard for {limit_s:g} s"
        finally:
            child.end()
        if begun is not None:
            left.remove(begun)
            yield {"fault": reason}
            yield {"end": begun}
        elif left:
            yield {"failed": reason}
            return
