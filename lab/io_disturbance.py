"""How much does a saturated disk queue slow the computation beside it, and what does each byte cost in CPU?

Interleaved rounds: a computation alone, then beside each engine of `io_load.py` in shuffled order, and alone
once more. Steps, bytes and CPU are read over the same window; a slow-down is against the same round's mean of
the two. A round in which other processes were busy is void and measured again; so is, once, a group of cells
whose reference spreads by more than 1.3 (p90/p10). Rows that are void and could not be repeated carry a *.
Prints a Markdown table per computation, medians with [p10, p90].
Invariant: no figure is dropped, except with its whole round.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from io_load import MIB, Bench, Cell, Group, Load, machine_busy

DIRECT = tuple(
    Cell(engine=e, depth=d)
    for e, d in (("threads", 2), ("threads", 4), ("uring", 2), ("uring", 4), ("uring", 8))
)
FED, FIXED = Cell(engine="uring-fed", depth=4), Cell(engine="uring-fixed", depth=4)
FROM_TORCH = tuple(
    Cell(engine=engine, depth=depth, source=source, pages=pages)
    for engine, depth in (("threads", 2), ("uring", 4))
    for source, pages in (("window", "4k"), ("window", "2m"), ("bounce", "4k"))
)
COLUMNS = ("slow-down %", "GB/s", "slow-down % per GB/s", "CPU-s/GB I/O threads", "process", "machine (mean)")
OTHERS_LIMIT = 0.25  # CPUs; a share of it is the kernel's own work for our I/O


def matmul() -> Callable[[], None]:
    """One step: 512x2048 @ 2048x2048 in fp32."""
    a, b, out = torch.randn(512, 2048), torch.randn(2048, 2048), torch.empty(512, 2048)
    return lambda: torch.mm(a, b, out=out)


def small() -> Callable[[], None]:
    """One step: forward and backward of eight 64x64 layers under saved-tensor hooks: interpreter-bound."""
    weight, x = (torch.randn(64, 64) / 8).requires_grad_(), torch.randn(64, 64)

    def step() -> None:
        h = x
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, t.shape), lambda packed: packed[0]):
            for _ in range(8):
                h = torch.tanh(h @ weight) + x
            h.sum().backward()

    return step


COMPUTATIONS = {"matmul": matmul, "none": lambda: lambda: time.sleep(0.05), "small": small}


def rate_of(step: Callable[[], None], seconds: float) -> float:
    """Steps per second over a window that ends with a whole step."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        step()
        count += 1
    return count / elapsed


def await_quiet(deadline: float) -> None:
    """Waits until the machine was nine tenths idle over 0.3 s, or the deadline."""
    while time.monotonic() < deadline:
        before = machine_busy()
        time.sleep(0.3)
        if machine_busy() - before <= 0.03 * (os.cpu_count() or 1):
            return


def measure(bench: Bench, group: Group, cell: Cell, step: Callable[[], None], seconds: float) -> list[float]:
    """Steps per s, GB/s, then CPU-s per GB of the I/O threads, the process, the whole machine."""
    load = Load(bench, cell, group)
    time.sleep(0.04)
    before = load.clocks()
    rate = rate_of(step, seconds)
    wall, moved, *cpu = load.clocks() - before
    load.stop()
    return [rate, moved / wall, *(float(c / moved) if moved else float("nan") for c in cpu)]


def run_round(
    bench: Bench, group: Group, options: argparse.Namespace, dice: random.Random
) -> dict[str, list]:
    """One sample of each cell, the computation alone before and after them, and what others used (CPUs)."""
    step, seconds = COMPUTATIONS[group.compute](), options.seconds * (2 if group.compute == "matmul" else 1)
    reference = matmul() if group.compute == "none" else step
    await_quiet(options.deadline)
    start, busy, own = time.perf_counter(), machine_busy(), time.process_time()
    rate_of(reference, 0.1)
    before = rate_of(reference, seconds)
    cells = dice.sample(group.cells, len(group.cells))
    samples = {str(cell): measure(bench, group, cell, step, seconds) for cell in cells}
    alone = [before, rate_of(reference, seconds)]
    others = (machine_busy() - busy - (time.process_time() - own)) / (time.perf_counter() - start)
    return samples | {"alone": alone, "others": [others]}


def run_group(bench: Bench, group: Group, options: argparse.Namespace) -> dict:
    """All rounds of a group, once more if the reference was unsteady; nothing repeats past the deadline."""
    dice = random.Random(options.seed)
    for attempt in range(2):
        rounds = []
        while len(rounds) < options.rounds:
            measured = run_round(bench, group, options, dice)
            if measured["others"][0] <= OTHERS_LIMIT or time.monotonic() > options.deadline:
                rounds.append(measured)
        p10, p90 = np.quantile([r["alone"] for r in rounds], (0.1, 0.9))
        if p90 <= 1.3 * p10 or attempt == 1 or time.monotonic() > options.deadline:
            break
    void = p90 > 1.3 * p10 or any(r["others"][0] > OTHERS_LIMIT for r in rounds)
    place = {"compute": group.compute, "write": group.write, "mib": group.record // MIB}
    return place | {
        "spread": p90 / p10,
        "void": bool(void),
        "cells": list(map(str, group.cells)),
        "rounds": rounds,
    }


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """Every computation, direction and record size, with the cells worth comparing there."""
    for compute in options.computations:
        for write in (False, True):
            extra = (FED, FIXED) if compute == "none" else (FED,) if compute == "small" else ()
            torch_cells = FROM_TORCH[: {"none": 6, "matmul": 3, "small": 0}[compute]] if write else ()
            for mib in options.mib:
                yield Group(
                    compute=compute, write=write, record=mib * MIB, cells=DIRECT + extra + torch_cells
                )


def figure(values: np.ndarray) -> str:
    """The median with [p10, p90]; a dash for what was not measured."""
    middle, low, high = np.quantile(values, (0.5, 0.1, 0.9))
    return "-" if np.isnan(middle) else f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def row(result: dict, cell: str) -> str:
    """One line of the table; CPU of process and machine only where they had nothing else to do."""
    alone = np.array([np.mean(r["alone"]) for r in result["rounds"]])
    rate, moved, threads, process, machine = np.array([r[cell] for r in result["rounds"]]).T
    idle = result["compute"] == "none"
    slow = 100 * (1 - rate / alone) * (np.nan if idle else 1)
    figures = [figure(x) for x in (slow, moved, slow / moved, threads)]
    figures += [figure(process), f"{machine.mean():.3g}"] if idle else ["-", "-"]
    name = cell + ("*" if result["void"] else "")
    return (
        "| " + " | ".join(["write" if result["write"] else "read", str(result["mib"]), name, *figures]) + " |"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "directory", type=Path, help="where the spill file is made; needs O_TMPFILE and O_DIRECT"
    )
    parser.add_argument("--file-mib", type=int, default=1024, help="size of the spill file (default 1024)")
    parser.add_argument(
        "--mib", type=int, nargs="+", default=[1, 2, 4, 8], choices=[1, 2, 4, 8], help="record sizes"
    )
    parser.add_argument("--computations", nargs="+", default=list(COMPUTATIONS), choices=list(COMPUTATIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.2,
        help="window of one measurement; doubled beside matmul (default 0.2)",
    )
    parser.add_argument("--patience", type=float, default=600, help="seconds within which voids are repeated")
    parser.add_argument("--seed", type=int, default=0, help="of cell order, addresses, page order, operands")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    return parser.parse_args()


def main() -> None:
    """Measures group after group, printing as it goes."""
    options = parse()
    torch.manual_seed(options.seed)
    options.deadline = time.monotonic() + options.patience
    bench, results = Bench(options.directory, options.file_mib * MIB, options.seed), []
    for group in groups(options):
        if group.compute not in {r["compute"] for r in results}:
            print(f"\n### beside: {group.compute}\n| | MiB | engine, depth | {' | '.join(COLUMNS)} |")
            print("|---" * (3 + len(COLUMNS)) + "|")
        results.append(run_group(bench, group, options))
        print(*(row(results[-1], cell) for cell in results[-1]["cells"]), sep="\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
