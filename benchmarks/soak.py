"""A served ring under random load with a fault a minute: what its processes hold grows by how much?

    python -m benchmarks.soak [--minutes 30] [--ranks 3] [--clients 4] [-m MODEL] [--seed 1] [--plot FILE] [--json]

`ringlm serve` has rank 0, and a supervisor starts the others again when they end. Clients stream answers of random
lengths over HTTP and hang up on some; what each prompt brings must be what it brought first. Faults are those of
tests/cluster/faults.py, of processes and of cables; only rank 1 is killed, so that the frontend and the others live
from start to end. Their memory (RssAnon), threads and descriptors are read every 5 s; slopes are of lines fitted to the
second half, since a cache is touched and an allocator filled by then. Without -m the model is a tiny random Llama.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ringlm.cluster.local import free_ports
from tests.cables import Cables, Relay
from tests.cluster.faults import FAULTS, Strike
from tests.cluster.rings import CABLED
from tests.tiny import VOCABULARY, save_llama

EVERY_S = 5.0
MEASURES = ("memory_mb", "threads", "descriptors")


def save_model(folder: Path) -> Path:
    """A tiny Llama whose tokens are words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"▁w{token}": token for token in range(VOCABULARY)}, unk_token="▁w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.save(str(save_llama(folder) / "tokenizer.json"))
    return folder


class Served:
    """`ringlm serve` and its daemons, which are started again when they end. A context manager."""

    def __init__(self, model: str, world_size: int, cables: Cables, log: Path) -> None:
        self.world_size = world_size
        self.restarts = 0
        self._model = model
        self._log = log
        *self._ports, self.port = free_ports(world_size + 1)
        self._secret = secrets.token_hex(16)
        pairs = itertools.permutations(range(world_size), 2)
        self._relays = {(by, to): cables.relay(self._ports[to]) for by, to in pairs}
        self._closing = threading.Event()
        self._processes = [self._start(rank) for rank in range(world_size)]
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        right = (rank + 1) % self.world_size
        ways = [f"{self._ports[to]}:{relay.port}" for (by, to), relay in self._relays.items() if by == rank]
        environment = {
            "RING_RANK": str(rank),
            "RING_WORLD_SIZE": str(self.world_size),
            "RING_PORT": str(self._ports[rank]),
            "RING_RIGHT": str(self._ports[right]),
            "RING_SECRET": self._secret,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{CABLED}:{os.environ.get('PYTHONPATH', '')}",
            "RINGLM_TEST_RELAYS": ",".join(ways),
        }
        command = [sys.executable, "-m", "ringlm", "serve", "-m", self._model, "--port", str(self.port)]
        command += ["--interface", "127.0.0.1", "--threads", "1", "--dtype", "float32", "--log-level", "warning"]
        with self._log.open("ab") as stderr:
            return subprocess.Popen(command, env=os.environ | environment, stdin=subprocess.DEVNULL, stderr=stderr)

    def _supervise(self) -> None:
        while not self._closing.wait(0.2):
            for rank, process in enumerate(self._processes):
                if rank and process.poll() is not None:
                    self.restarts += 1
                    self._processes[rank] = self._start(rank)

    def await_ready(self, limit_s: float = 300.0) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            if time.monotonic() > deadline or self._processes[0].poll() is not None:
                raise TimeoutError(f"not ready after {limit_s:g} s; see {self._log}")
            time.sleep(0.5)

    def survivors(self) -> dict[str, int]:
        """The processes that no fault ends, by name."""
        others = {f"rank {rank}": self._processes[rank].pid for rank in range(2, self.world_size)}
        return {"frontend": self._processes[0].pid, "rank 0": self.pid(0), **others}

    # -- what befalls it -----------------------------------------------------------------------

    def pid(self, rank: int) -> int:
        """Of the engine process of `rank`; rank 0's is the frontend's child."""
        own = self._processes[rank].pid
        return own if rank else int(Path(f"/proc/{own}/task/{own}/children").read_text().split()[0])

    def signal(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(rank), number)

    def go_on(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def ways(self, rank: int, other: int | None) -> list[Relay]:
        pairs = [pair for pair in self._relays if rank in pair and (other is None or other in pair)]
        return [self._relays[pair] for pair in pairs]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(60.0)
            except subprocess.TimeoutExpired:
                process.kill()


class Load:
    """Clients that ask, each on a thread of its own, until `over` is set. `counts`: answers that were complete, given
    up, and different from the first to their prompt; events; and errors, the last of which is `error`."""

    def __init__(self, port: int, clients: int, seed: int) -> None:
        draw = random.Random(seed)
        self.over = threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.error = ""
        self._port = port
        self._bodies = [self._body(draw) for _ in range(24)]
        self._first: dict[int, str] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(f"{seed}.{at}",)) for at in range(clients)]
        for thread in self._threads:
            thread.start()

    def _body(self, draw: random.Random) -> dict[str, Any]:
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.choice([3, 30, 300]))]
        common = {"stream": True, "ignore_eos": True, "max_tokens": draw.randrange(8, 240)}
        return {"prompt": prompt, "temperature": draw.choice([0.0, 1.0]), "seed": draw.randrange(1000), **common}

    def _client(self, seed: str) -> None:
        draw = random.Random(seed)
        while not self.over.is_set():
            number = draw.randrange(len(self._bodies))
            patience = draw.randrange(1, 20) if draw.random() < 0.1 else None
            try:
                self._ask(number, patience)
            except (OSError, http.client.HTTPException, ValueError) as error:
                with self._lock:
                    self.counts["errors"] += 1
                    self.error = f"{type(error).__name__}: {error}"
                time.sleep(0.5)
            time.sleep(draw.expovariate(2.0))

    def _ask(self, number: int, patience: int | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120.0)
        with contextlib.closing(connection):
            body = json.dumps(self._bodies[number])
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {answer.read(300).decode()}")
            text, events, reason = "", 0, None
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    text += event["choices"][0]["text"]
                    reason = event["choices"][0]["finish_reason"]
                    events += 1
                    if events == patience:
                        break
        with self._lock:
            self.counts["events"] += events
            if events == patience:
                self.counts["given up"] += 1
            elif reason != "length":
                raise ValueError(f"an answer ended by {reason}")
            else:
                self.counts["complete"] += 1
                self.counts["different"] += self._first.setdefault(number, text) != text

    def close(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(120.0)


def reading(pid: int) -> tuple[float, float, float]:
    """Private memory in MB, threads and descriptors."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (
        int(fields["RssAnon"].split()[0]) / 1024,
        int(fields["Threads"]),
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def soak(served: Served, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """Read and strike until the time is up."""
    draw = random.Random(options.seed)
    pids = served.survivors()
    readings: dict[str, list[tuple[float, ...]]] = {name: [] for name in pids}
    strikes: list[Strike] = []
    began = time.monotonic()
    struck = 0
    while (now_s := time.monotonic() - began) < options.minutes * 60:
        if now_s >= 60 * (struck + 1):
            struck += 1
            fault = draw.choice(FAULTS)
            strikes.append(Strike(served, fault, draw, 1 if fault == "kill" else None))
            print(f"minute {now_s / 60:.0f}: {strikes[-1].text}; {dict(load.counts)} {load.error}", file=sys.stderr)
        for name, pid in pids.items():
            with contextlib.suppress(FileNotFoundError):  # it has ended, which the answers and the last minute show
                readings[name].append((now_s / 60, *reading(pid)))
        time.sleep(EVERY_S)
    for strike in strikes:
        strike.over()
    return {
        "readings": readings,
        "faults": collections.Counter(strike.text.split(" of rank")[0] for strike in strikes),
        "restarts": served.restarts,
        "answers": load.counts,
    }


def fitted(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By process and measure: its median in the first, the sixth and the last tenth, and the second half's slope an
    hour."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, readings in result["readings"].items():
        tenths = np.array_split(np.array(readings), 10)
        minutes, *columns = np.concatenate(tenths[5:]).T
        rows[name] = {}
        for at, (measure, values) in enumerate(zip(MEASURES, columns, strict=True), 1):
            start, half, end = (float(np.median(tenths[tenth][:, at])) for tenth in (0, 5, 9))
            slope = float(np.polyfit(minutes / 60, values, 1)[0])
            rows[name][measure] = {"start": start, "half": half, "end": end, "slope_an_hour": slope}
    return rows


def draw_plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MEASURES), 1, sharex=True, figsize=(8, 7))
    for at, (measure, axis) in enumerate(zip(MEASURES, axes, strict=True), 1):
        for name, readings in result["readings"].items():
            axis.plot(*zip(*((row[0], row[at]) for row in readings[::3]), strict=True), label=name, linewidth=1)
        axis.set_ylabel(measure.replace("_mb", " in MB"))
        axis.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("minutes; a fault at each")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("-m", "--model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["RINGLM_SHARD_CACHE_GB"] = "0"
    folder = Path(tempfile.mkdtemp(prefix="ringlm-soak-"))
    model = options.model or str(save_model(folder / "llama"))
    with Cables() as cables, Served(model, options.ranks, cables, folder / "log") as served:
        served.await_ready()
        load = Load(served.port, options.clients, options.seed)
        try:
            result = soak(served, load, options)
        finally:
            load.close()
    rows = fitted(result)
    if options.plot is not None:
        draw_plot(result, options.plot)
    if options.json:
        print(json.dumps({**result, "fitted": rows}))
    else:
        print(f"faults {dict(result['faults'])}, restarts {result['restarts']}, answers {dict(result['answers'])}")
        print("| process | measure | start | half | end | slope an hour |\n|---|---|---|---|---|---|")
        for name, measures in rows.items():
            for measure, row in measures.items():
                print(f"| {name} | {measure} | {' | '.join(f'{value:.1f}' for value in row.values())} |")
    return 1 if result["answers"]["errors"] or result["answers"]["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
