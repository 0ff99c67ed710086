"""The far end of `ringlm launch --hosts`: started by ssh, it starts one rank there and ends it with the launcher.

    python -m ringlm.cluster.remote

Its input is a line with the Order, then a byte for each signal that the rank is to get. The end of its input means that
the launcher or the link to it is gone. Its output is the rank's, and its status, too. Knows no ring and no model.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import msgspec

from ringlm.cluster.order import LONGEST, Order, end, exit_status

_GRACE_S = 40.0  # for a server's last answers, once nobody is there to read about them


def main() -> int:
    """The rank's exit status; 2 for what is no order."""
    try:
        order = msgspec.json.decode(_line(), type=Order)
    except msgspec.MsgspecError as error:
        sys.stderr.write(f"ringlm: this is for 'ringlm launch --hosts' to start, and it sent no order: {error}\n")
        return 2
    if order.folder is not None:
        with contextlib.suppress(OSError):  # what is relative to it will be missed by name
            os.chdir(order.folder)
    reader, writer = os.pipe()  # this process's own end ends the rank, too
    process = order.start(reader, stdin=subprocess.DEVNULL, start_new_session=True)
    os.close(reader)
    threading.Thread(target=_obey, args=(process,), name="ringlm-launcher", daemon=True).start()
    status = exit_status(process.wait())
    os.close(writer)
    return status


def _line() -> bytes:
    """The first line of the input, and no byte more."""
    line = bytearray()
    while len(line) < LONGEST and (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _obey(process: subprocess.Popen[bytes]) -> None:
    while byte := os.read(0, 1):
        with contextlib.suppress(ValueError):  # no signal's number
            process.send_signal(signal.Signals(byte[0]))
    process.terminate()
    end(process, _GRACE_S, _GRACE_S)


if __name__ == "__main__":
    sys.exit(main())
