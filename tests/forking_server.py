"""A program that forks a new server whenever it is told to: it has imported everything before.

    python -m tests.forking_server

For each line on its standard input it prints the process id and the address of a new server. The
server before it must have been killed. With its input it ends, and kills the last one.
"""

import gc
import os
import signal
import sys

# What a start would import only then.
import anyio._backends._asyncio  # noqa: F401 - it is imported for its own sake
import httpcore2  # noqa: F401 - as above

from chatterd import server, settings
from chatterd.app import create_app
from chatterd.listener import Address, Listener


def main() -> None:
    """Fork a server for each line."""
    gc.freeze()  # a start looks through all there is
    before = None
    for _ in sys.stdin:
        if before is not None:
            os.waitpid(before, 0)
        before = os.fork()
        if before == 0:
            _serve()
            os._exit(1)
    if before is not None:
        os.kill(before, signal.SIGKILL)
        os.waitpid(before, 0)


def _serve() -> None:
    address = Address("127.0.0.1", 0)
    with Listener(address) as listener:
        url = listener.url

        def announce() -> None:
            sys.stdout.write(f"{os.getpid()} {url}\n")
            sys.stdout.flush()

        server.run(create_app(settings.DATABASE_URL), listener, announce)


if __name__ == "__main__":
    main()
