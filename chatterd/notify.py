"""Telling whoever started us how we are: systemd's protocol, sd_notify(3)."""

import logging
import os
import socket

logger = logging.getLogger(__name__)


def notify(*lines: str) -> None:
    """Send lines such as READY=1; nothing where nobody asked for them. Does not wait."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":  # Linux's abstract sockets, which have no file
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), address)
    except ConnectionRefusedError:
        pass  # there is nobody any more
    except OSError as error:
        logger.warning("%s cannot be told: %s", lines[0], error.strerror)


def watchdog_seconds() -> float | None:
    """Return how often we must say WATCHDOG=1 not to be taken for hung; None: not at all."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not wanted.isdigit() or int(wanted) == 0 or pid != str(os.getpid()):
        return None
    return int(wanted) / 1_000_000
