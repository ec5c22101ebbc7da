"""A saturated disk queue in the background: Python threads, or the io_uring loop of `uring_loop.cpp`.

Both move records with O_DIRECT between one unlinked file and a huge-page slab; writes may also leave ordinary
torch memory, zero-copy from the enclosing 4096-aligned window or copied into the slab first.
It knows no queue, priority, checksum or computation: every engine is at its cheapest.
Invariant: a slot is owned by one transfer at a time; a short or failed transfer ends the load with its error.
"""

import ctypes
import itertools
import mmap
import os
import random
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PAGE, MIB, HUGE, DEEPEST, LARGEST = 4096, 1 << 20, 2 << 20, 8, 8 << 20
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One engine at one depth, reading into or writing from one kind of memory."""

    engine: str  # threads | uring | uring-fixed (registered buffers) | uring-fed (one Python call per record)
    depth: int
    source: str = "slot"  # slot | window (zero-copy from torch memory) | bounce (copied into the slot)
    pages: str = "4k"  # of that torch memory

    def __str__(self) -> str:
        return f"{self.engine} {self.depth}" + (
            "" if self.source == "slot" else f" {self.source} {self.pages}"
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells to compare: one computation, one direction, one record size."""

    compute: str
    write: bool
    record: int
    cells: tuple[Cell, ...]


class Job(ctypes.Structure):
    """`Job` of uring_loop.cpp."""

    _fields_ = (
        *((n, ctypes.c_uint32) for n in ("fd", "depth", "is_write", "is_fixed", "source", "source_count")),
        *((n, ctypes.c_uint64) for n in ("payload", "stride", "records", "slots", "sources", "moved")),
    )


def view(address: int, nbytes: int) -> ctypes.Array:
    """A writable buffer over raw memory."""
    return (ctypes.c_char * nbytes).from_address(address)


def torch_memory(nbytes: int, seed: int | None) -> torch.Tensor:
    """Ordinary torch memory: pages touched in random order (scattered frames), or huge pages if no seed."""
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    if seed is None:
        start = ctypes.c_void_p(tensor.data_ptr() & -PAGE)
        if LIBC.madvise(start, ctypes.c_size_t(nbytes), mmap.MADV_HUGEPAGE):
            raise OSError(ctypes.get_errno(), "no huge pages for torch memory")
    pages = (
        np.arange(nbytes // PAGE) if seed is None else np.random.default_rng(seed).permutation(nbytes // PAGE)
    )
    tensor.numpy()[pages * PAGE] = 1
    return tensor


class Bench:
    """What all cells share: the file, the huge-page slab, the torch memory, the compiled loop."""

    def __init__(self, directory: Path, nbytes: int, seed: int) -> None:
        self.library, self.nbytes = compiled_loop(), nbytes
        self.slab = mmap.mmap(-1, DEEPEST * LARGEST + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.slab.madvise(mmap.MADV_HUGEPAGE)
        self.slab_start = -(-ctypes.addressof(ctypes.c_char.from_buffer(self.slab)) // HUGE) * HUGE
        ctypes.memset(self.slab_start, 1, DEEPEST * LARGEST)
        self.tensors = {"4k": torch_memory(128 * MIB, seed), "2m": torch_memory(128 * MIB, None)}
        self.fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, self.nbytes)
        for offset in range(0, self.nbytes, LARGEST):
            if os.pwrite(self.fd, view(self.slab_start, LARGEST), offset) != LARGEST:
                raise OSError("short write while the file was filled")

    def sources(self, cell: Cell, record: int) -> list[int]:
        """Addresses of records in torch memory, 64-byte-aligned at random; together past the caches."""
        tensor, step, dice = self.tensors[cell.pages], record + 2 * PAGE, random.Random(record)
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        return [start + i * step + 64 * dice.randrange(1, 64) for i in range((tensor.numel() - PAGE) // step)]


def compiled_loop() -> ctypes.CDLL:
    """`uring_loop.cpp`, compiled by g++; ctypes lets go of the GIL during its calls."""
    with tempfile.TemporaryDirectory() as folder:
        target, source = f"{folder}/uring_loop.so", Path(__file__).with_name("uring_loop.cpp")
        subprocess.run(["g++", "-std=c++20", "-O2", "-shared", "-fPIC", source, "-o", target], check=True)
        library = ctypes.CDLL(target)
    library.uring_open.restype = ctypes.c_void_p
    return library


def machine_busy() -> float:
    """CPU seconds of the whole machine so far, interrupts and kernel threads included."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def ring_workers_cpu() -> float:
    """CPU seconds so far of the kernel workers that io_uring hands blocking requests to."""
    tasks = [
        task
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().startswith("iou-wrk")
    ]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class Load:
    """The I/O threads of one cell: a saturated queue until `stop`."""

    def __init__(self, bench: Bench, cell: Cell, group: Group) -> None:
        self.bench, self.cell, self.group = bench, cell, group
        self.nbytes = group.record + (PAGE if cell.source == "window" else 0)
        self.slots = [bench.slab_start + i * group.record for i in range(cell.depth)]
        self.sources = [] if cell.source == "slot" else bench.sources(cell, group.record)
        self.halt, self.next_record, self.failures = ctypes.c_int32(0), itertools.count(), []
        self.moved = (ctypes.c_uint64 * cell.depth)()
        bodies = [(self.work, i) for i in range(cell.depth)] if cell.engine == "threads" else [(self.ring,)]
        self.threads = [threading.Thread(target=self.guard, args=body, daemon=True) for body in bodies]
        for thread in self.threads:
            thread.start()

    def guard(self, body: Callable[..., None], *args: int) -> None:
        """Runs the body of a thread and keeps what it raises."""
        try:
            body(*args)
        except BaseException as failure:  # stop() raises it
            self.failures.append(failure)

    def work(self, worker: int) -> None:
        """One of the threads that take record after record."""
        slot, move = self.slots[worker], os.pwritev if self.group.write else os.preadv
        starts = [a & -PAGE for a in self.sources] if self.cell.source == "window" else [slot]
        views = [[view(start, self.nbytes)] for start in starts]
        while not self.halt.value:
            record = next(self.next_record)
            if self.cell.source == "bounce":
                ctypes.memmove(slot, self.sources[record % len(self.sources)], self.group.record)
            offset = record % (self.bench.nbytes // self.nbytes) * self.nbytes
            if move(self.bench.fd, views[record % len(views)], offset) != self.nbytes:
                raise OSError("short transfer")
            self.moved[worker] += self.group.record

    def ring(self) -> None:
        """The one thread that keeps an io_uring full."""
        slots, sources = ((ctypes.c_uint64 * len(a))(*a) for a in (self.slots, self.sources))
        kind, fixed = ("slot", "window", "bounce").index(self.cell.source), self.cell.engine == "uring-fixed"
        job = Job(
            self.bench.fd, self.cell.depth, self.group.write, fixed, kind, len(sources), self.group.record
        )
        job.stride, job.records = self.nbytes, self.bench.nbytes // self.nbytes
        job.slots, job.sources, job.moved = (ctypes.addressof(a) for a in (slots, sources, self.moved))
        code, library = ctypes.c_int(0), self.bench.library
        ring = ctypes.c_void_p(library.uring_open(ctypes.byref(job), ctypes.byref(code)))
        error = code.value
        while self.cell.engine == "uring-fed" and not (self.halt.value or error):
            error = library.uring_step(ring)
        error = error or library.uring_run(ring, ctypes.byref(self.halt))
        error = library.uring_close(ring) or error
        if error:
            raise OSError(-error, os.strerror(-error))

    def clocks(self) -> np.ndarray:
        """So far: wall s, payload GB, CPU s of the I/O threads, of the process, of the whole machine."""
        threads = sum(time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in self.threads)
        threads += ring_workers_cpu()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        process = usage.ru_utime + usage.ru_stime
        return np.array([time.perf_counter(), sum(self.moved) / 1e9, threads, process, machine_busy()])

    def stop(self) -> None:
        """Returns when every transfer has completed; raises what a thread raised."""
        self.halt.value = 1
        for thread in self.threads:
            thread.join()
        for failure in self.failures:
            raise failure
