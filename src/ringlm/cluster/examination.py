"""What one machine is and can do: versions, devices, interfaces, memory, and how fast it reads and computes.

    python -m ringlm.cluster.examination --device auto

Measured by a process of its own, since a broken torch must not end who asks; that one needs no torch. Knows no ring.
"""

from __future__ import annotations

import argparse
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from ringlm import __version__
from ringlm.cluster.agreement import Capabilities, fast_dtypes
from ringlm.cluster.cores import threads_for
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, RingLMError
from ringlm.ring.handshake import PROTOCOL

if TYPE_CHECKING:
    import torch

_TIMEOUT_S: Final = 120.0  # on a machine that does other things, too
_SECONDS: Final = 0.7  # for each figure
_READ_BYTES: Final = 1 << 28  # more than caches hold
_WIDTH: Final = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of the square matrices that are multiplied

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Interface(msgspec.Struct, frozen=True):
    """A network interface; `mbit_s` is what it claims, 0 where it does not say."""

    name: str
    mbit_s: int
    wireless: bool


class Findings(msgspec.Struct, frozen=True):
    """A machine. `devices` has a line for each that it could compute on; the figures are those of `device`, with
    `threads` on a CPU: bytes read and floating-point operations done in a second, the latter in `dtype`. `interfaces`
    are by address."""

    host: str
    system: str
    python: str
    ringlm: str
    protocol: int
    torch: str
    device: str
    devices: list[str]
    threads: int
    dtype: str
    read_bytes_per_s: _Positive
    flops: _Positive
    interfaces: dict[str, Interface]


class Examined(msgspec.Struct, frozen=True):
    """All of it, and what a rank says of itself."""

    findings: Findings
    capabilities: Capabilities


def examine(device: str, threads: int | None) -> Examined:
    """This machine, by a process of its own. Raises ConfigError for what must be mended before ringlm runs here."""
    command = [sys.executable, "-m", "ringlm.cluster.examination", "--device", device]
    command += [] if threads is None else ["--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RingLMError(f"this machine could not be examined in {_TIMEOUT_S:g} s; what else keeps it busy?") from None
    last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    if done.returncode == ConfigError.exit_status:
        raise ConfigError(last)
    if done.returncode:
        raise ConfigError(
            f"torch does not work in {sys.prefix}: {last}. Install it again: {sys.executable} -m pip install "
            "--force-reinstall torch"
        )
    return msgspec.json.decode(done.stdout, type=Examined)


def interfaces() -> dict[str, Interface]:
    """Those of this machine that are up, by each of their addresses, loopback's aside."""
    import psutil

    stats, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup or "loopback" in stats[name].flags:
            continue
        wireless = Path(f"/sys/class/net/{name}/wireless").exists()
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found[address.address] = Interface(name, stats[name].speed, wireless)
    return found


def _examined(name: str, threads: int | None) -> Examined:
    import torch

    from ringlm.cluster.loading import device_memory, hardware, pick_device

    device = pick_device(name)
    torch.set_num_threads(threads or threads_for(1))
    kinds = fast_dtypes(str(device))
    capabilities = Capabilities(-1, str(device), kinds, Settings(), device_memory(device), hardware(device))
    findings = Findings(
        host=socket.gethostname(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        ringlm=__version__,
        protocol=PROTOCOL,
        torch=str(torch.__version__),
        device=str(device),
        devices=_devices(),
        threads=torch.get_num_threads(),
        dtype=kinds[0],
        read_bytes_per_s=_read_bytes_per_s(device, capabilities.memory.free),
        flops=_flops(device, getattr(torch, kinds[0])),
        interfaces=interfaces(),
    )
    return Examined(findings, capabilities)


def _devices() -> list[str]:
    import torch

    from ringlm.parallel.kernels.choice import processor

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return [f"cpu {processor()}", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _read_bytes_per_s(device: torch.device, free: int) -> float:
    """By a sum of floats, which is little work beside reading them."""
    import torch

    numbers = torch.ones(max(1 << 18, min(_READ_BYTES, free // 4) // 4), device=device)
    return numbers.nbytes / _fastest(lambda: numbers.sum(), device)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    width = _WIDTH[device.type]
    one = torch.ones(width, width, device=device, dtype=dtype)
    return 2 * width**3 / _fastest(lambda: one @ one, device)


def _fastest(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of the fastest of several times: what nothing else got in the way of."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    work()  # compiles, and brings things into caches
    wait()
    times: list[float] = []
    stop = time.monotonic() + _SECONDS
    while len(times) < 3 or time.monotonic() < stop:
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> int:
    """The process; what it found is on stdout, as JSON."""
    parser = argparse.ArgumentParser(prog="ringlm-examination")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        print(msgspec.json.encode(_examined(arguments.device, arguments.threads)).decode())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
