"""ringlm beside other engines: the same shapes, on this machine, in rounds in which each has its turn.

    python benchmarks/compare.py [--models smollm2-135m,llama-3.2-1b,llama-3.2-3b] [--quant int4] [-p 512] [-n 64]
        [--rounds 3] [--llama-bench PATH] [--dllama PATH] [--mistralrs-python PATH] [--plot FILE] [--json]
    python benchmarks/compare.py --models llama-3.2-1b --quant none --dtype bfloat16  # transformers' tensor parallelism
    python benchmarks/compare.py --models demo --quant int4                           # a real model: mistral.rs as well

Every engine has as many threads in all as ringlm has ranks of one thread: llama.cpp and mistral.rs in one process,
distributed-llama and transformers spread like ringlm. Reported are medians of the rounds: ppN is a prompt of N tokens,
tgN an answer of N. int4 is Q4_0 in files, int8 Q8_0, none bfloat16 in folders and F16 in GGUF files. What each engine
computes in is its own affair. Engines that are not here are named, and so is what one of them cannot do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import make_model
import peers
from rich.console import Console
from rich.table import Table

COLOURS = ("#2a6f97", "#9aa5b1", "#c9ada7", "#a3b18a", "#e0c097")


def main() -> None:
    options = parse()
    task = peers.Task(
        ranks=options.ranks,
        prompt=options.p,
        tokens=options.n,
        quant=options.quant,
        dtype=options.dtype,
        timeout_s=options.timeout,
        prefix=tuple(shlex.split(options.prefix)),
    )
    engines: list[peers.Peer] = [
        peers.Ringlm(),
        *llama_cpp(options.llama_bench or ["llama-bench"]),
        peers.DistributedLlama(options.dllama),
        peers.Transformers(),
        peers.MistralRs(options.mistralrs_python),
    ]
    if options.engines:
        engines = [engine for engine in engines if engine.name.split()[0] in options.engines.split(",")]
    missing = {engine.name: reason for engine in engines if (reason := engine.missing())}
    engines = [engine for engine in engines if engine.name not in missing]
    models = [peers.Model(name, options.folder) for name in options.models.split(",")]
    rows = compare(engines, models, task, options.rounds)
    result = {"machine": machine(), "options": vars(options), "rows": rows, "missing": missing}
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        print(json.dumps(result, default=str))
    else:
        show(rows, missing, f"{options.quant}, {options.dtype}, {options.ranks} threads in all")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m,llama-3.2-1b,llama-3.2-3b", help="shapes, or demo")
    parser.add_argument("--folder", type=Path, default=Path("bench-models"), help="where models are, or are made")
    parser.add_argument("--engines", help="some of them, such as ringlm,llama.cpp; all that are here by default")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt; 0: none")
    parser.add_argument("-n", type=int, default=64, help="tokens of the answer; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quant", default="int4", choices=("none", "int8", "int4"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="ringlm's")
    parser.add_argument("--llama-bench", action="append", help="llama.cpp's program; again for another build of it")
    parser.add_argument("--dllama", default="dllama", help="distributed-llama's program")
    parser.add_argument("--mistralrs-python", default=sys.executable, help="a Python with the package mistralrs")
    parser.add_argument("--prefix", default="", help="before every engine's command, such as 'taskset -c 0,1'")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one engine's turn")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture as well, .png or .svg")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := {*options.models.split(",")} - {*make_model.SHAPES, "demo"}:
        parser.error(
            f"no such model: {', '.join(sorted(unknown))}; there are {', '.join((*make_model.SHAPES, 'demo'))}"
        )
    if options.ranks < 1 or options.rounds < 1 or min(options.p, options.n) < 0 or options.n == 1:
        parser.error("--ranks and --rounds are 1 or more, -p 0 or more, -n 0 or 2 and more")
    if options.plot:
        try:
            import matplotlib  # noqa: F401 - better now than after an hour
        except ImportError:
            parser.error("--plot needs matplotlib; pip install matplotlib, or leave it out")
    return options


def llama_cpp(builds: Sequence[str]) -> list[peers.LlamaCpp]:
    """Each build of it, by the name of its file where there are several."""
    if len(builds) == 1:
        return [peers.LlamaCpp(builds[0])]
    return [peers.LlamaCpp(build, f"llama.cpp ({Path(build).name.removeprefix('llama-bench-')})") for build in builds]


def compare(
    engines: Sequence[peers.Peer], models: Sequence[peers.Model], task: peers.Task, rounds: int
) -> list[dict[str, Any]]:
    """One row for each model, test and engine, with every round's figure, or the reason why there is none."""
    found: dict[tuple[str, str], list[peers.Result]] = {}
    failed: dict[tuple[str, str], str] = {}
    for round_ in range(rounds):
        for model in models:
            for engine in engines:
                key = (model.name, engine.name)
                if key in failed:
                    continue
                if reason := engine.refuses(model, task):
                    failed[key] = reason
                    continue
                print(f"round {round_ + 1} of {rounds}: {model.name}, {engine.name} …", file=sys.stderr, flush=True)
                try:
                    found.setdefault(key, []).append(engine.measure(model, task))
                except (peers.Failed, ValueError, LookupError) as error:
                    failed[key] = f"failed: {error}"
    return [
        row
        for model in models
        for test, size in (("pp", task.prompt), ("tg", task.tokens))
        if size
        for row in rows_of(model.name, f"{test}{size}", engines, task, found, failed)
    ]


def rows_of(
    model: str,
    test: str,
    engines: Sequence[peers.Peer],
    task: peers.Task,
    found: dict[tuple[str, str], list[peers.Result]],
    failed: dict[tuple[str, str], str],
) -> Iterator[dict[str, Any]]:
    """Of one model and test; `of_ringlm` is this engine's speed in terms of ringlm's."""
    field = "prefill" if test.startswith("pp") else "decode"
    ours = None
    for engine in engines:
        key = (model, engine.name)
        results = found.get(key, [])
        figures = [figure for result in results if (figure := getattr(result, field)) is not None]
        middle = statistics.median(figures) if figures else None
        if isinstance(engine, peers.Ringlm):
            ours = middle
        yield {
            "model": model,
            "test": test,
            "engine": engine.name,
            "setup": engine.setup(task),
            "tokens_per_s": middle,
            "of_ringlm": middle / ours if middle and ours else None,
            "rounds": figures,
            "reason": failed.get(key),
            "version": results[0].version if results else None,
            "commands": results[0].commands if results else [],
        }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()}


def show(rows: Sequence[dict[str, Any]], missing: dict[str, str], title: str) -> None:
    """A table: rich on a terminal, plain columns in a pipe."""
    head = ("model", "test", "engine", "how", "tokens/s", "of ringlm")
    lines = []
    for row in rows:
        if row["tokens_per_s"] is None:
            continue  # a note says why
        ratio = f"{row['of_ringlm']:.2f}x" if row["of_ringlm"] else "-"
        lines.append((row["model"], row["test"], row["engine"], row["setup"], f"{row['tokens_per_s']:.1f}", ratio))
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["reason"]:
            notes.setdefault((row["engine"], row["reason"]), {})[row["model"]] = None
    notes |= {(engine, reason): {"not here": None} for engine, reason in missing.items()}
    if sys.stdout.isatty():
        table = Table(*head, title=title)
        table.columns[4].justify = table.columns[5].justify = "right"
        for line, (following, *_) in zip(lines, [*lines[1:], ("",)], strict=True):
            table.add_row(*line, end_section=line[0] != following)
        Console().print(table)
    else:
        print(title)
        widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
        for line in (head, *lines):
            cells = (cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True))
            names = (cell.ljust(width) for cell, width in zip(line[:4], widths, strict=False))
            print("  ".join((*names, *cells)))
    for (engine, reason), about in notes.items():
        print(f"{engine}, {', '.join(about)}: {reason}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model and test, a bar for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models, tests = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "test"))
    names = list(dict.fromkeys(row["engine"] for row in rows if row["tokens_per_s"]))
    size = (4.2 * len(models), 0.6 + 1.9 * len(tests))
    figure, axes = pyplot.subplots(len(tests), len(models), figsize=size, squeeze=False, layout="constrained")
    for line, test in zip(axes, tests, strict=True):
        for panel, model in zip(line, models, strict=True):
            here = [row for row in rows if (row["model"], row["test"]) == (model, test) and row["tokens_per_s"]]
            colours = [COLOURS[names.index(row["engine"]) % len(COLOURS)] for row in here]
            bars = panel.barh([row["engine"] for row in here], [row["tokens_per_s"] for row in here], color=colours)
            panel.bar_label(bars, fmt="{:.1f}", padding=3)
            panel.margins(x=0.2)
            panel.invert_yaxis()
            panel.set_title(f"{model}, {test}", fontsize=10, loc="left")
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.set_xticks([])
    figure.suptitle("tokens per second", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
