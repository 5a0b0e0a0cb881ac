"""A rank that rank 0 started: loads its part, does what rank 0 says, and is gone when rank 0 is.

python -m moec.runtime.ranks.worker ENGINE        with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> None:
    """Exit code 0 after rank 0 closed the engine, 1 after an error, which goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from moec.runtime.engine import load
    from moec.runtime.errors import EngineError

    code = 0
    try:
        load(sys.argv[1]).serve()
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # threads of torch.distributed may wait for a rank that is gone


def _end_with_parent() -> None:
    """Standard input is a pipe from rank 0 that nobody writes to: it ends when rank 0 does."""
    while os.read(0, 1):
        pass
    threading.Event().wait(2.0)  # the watch says more, if it runs already
    os._exit(1)


if __name__ == "__main__":
    main()
