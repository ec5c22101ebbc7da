"""ActivationSpill: training whose saved activations live on disk, with the same numbers.

Answers for what autograd sees: what a saved tensor is traded for, and that the tensor given back is the one saved.
Where bytes are is `Residency`'s affair, when they are wanted `Order`'s, which to spill the planner's. Invariants:
results are bit-identical to plain training; an in-place edit raises where plain autograd raises; the bytes held never
exceed the budget.

Source: SSDTrain (arXiv 2408.10013), with storages in the place of its tensor ids, a byte budget in the place of its
layer count, and no calls from modules or schedulers.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import Counter
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

import torch

from undercroft import arithmetic, machine
from undercroft.errors import BudgetExceeded, InvalidInput, SpillMisuse, TierFull, UnsupportedModel
from undercroft.events import Recorder
from undercroft.store import pool
from undercroft.store.blocks import Blocks
from undercroft.store.budget import Budget, Tier
from undercroft.store.gds import GdsSyscalls
from undercroft.store.heap import Heap
from undercroft.store.ranges import BLOCK
from undercroft.store.scratch import Scratch
from undercroft.store.slab import HUGE_PAGE, Lender, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.training.carrier import Carrier, CudaCarrier, GdsCarrier, HostCarrier
from undercroft.training.entry import Entry
from undercroft.training.graph import own_gradients, packed_by_node, running_node
from undercroft.training.identity import SavedView, StorageRef, check_version, storage_key, why_kept
from undercroft.training.order import Call, Order
from undercroft.training.plan import Plan, make_plan
from undercroft.training.recording import Recording
from undercroft.training.report import SpillReport
from undercroft.training.residency import Residency
from undercroft.training.simulation import Rates
from undercroft.units import MIB, format_size, parse_size

_STALL_ALLOWED = 0.02
_PREFETCH_LOOKAHEAD = 256
_STEPS_TO_REACH = 16  # room on disk that none of so many steps needed goes back
_LONGEST_STEP = 1_000_000
_active = threading.local()


class _Kept:
    """A saved tensor that stays by reference."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version


class _Token:
    """What autograd keeps in the place of a saved tensor. When the last token of an entry dies, so does the entry."""

    __slots__ = ("entry", "spill", "unpacked", "view")

    def __init__(self, spill: ActivationSpill, entry: Entry, view: SavedView) -> None:
        self.spill = spill
        self.entry = entry
        self.view = view
        self.unpacked = -1

    def __del__(self) -> None:
        self.spill._bury(self.entry, self.unpacked)  # pyright: ignore[reportPrivateUsage]


class ActivationSpill:
    """A context manager around forward and backward: what autograd saves is held under `budget`, the rest on disk.

    Enter it once around a whole loop or once per step. The first step is recorded; from the second on a plan says
    what to write. Leaving the context does not invalidate what was saved inside: backward may follow later.

    Args:
        model: a module whose parameters and buffers are never written. Without it, what outlives the first step is
            not written from the second on.
        budget: the most bytes of activations, writes in flight and read buffers to hold in memory.
        directory: where to spill, or several on several disks; a directory below Undercroft's home if None.
        min_bytes: storages smaller than this stay in memory (and count in the budget).
        capacity: the most bytes of disk to occupy.
        write_cap: the most bytes ever to write, to spare an SSD.
        checksums: verify what comes back (about 0.12 CPU-s per GB).
        gds: move the activations of a GPU between it and the disk by GPUDirect Storage, past RAM: needs kvikio.
        workers: I/O threads; all but one may write at once.
        recorder: where transfers are recorded; none are kept by default.

    Raises:
        InvalidInput: a size that cannot be meant, or GPUDirect Storage where it is not to be had.
        UnsafeDirectory: the directory cannot hold private bytes.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        budget: int | str = "512MiB",
        directory: str | Path | list[str | Path] | None = None,
        min_bytes: int | str = "1MiB",
        *,
        capacity: int | str | None = None,
        write_cap: int | str | None = None,
        checksums: bool = False,
        gds: bool = False,
        workers: int = 3,
        recorder: Recorder | None = None,
    ) -> None:
        self.budget = parse_size(budget)
        if self.budget == 0:
            raise InvalidInput('a spill needs a budget of more than 0 bytes, such as "512MiB"')
        arithmetic.settle()
        self._model = model
        self._min_bytes = parse_size(min_bytes)
        self._pid = os.getpid()
        self._recorder = recorder or Recorder(enabled=False)
        self._books = Budget(host=self.budget, device=self.budget)
        self._heap = Heap(patience=max(self.budget, 64 * MIB))
        buffers = _read_buffers(self._books, self.budget)
        self._carriers: dict[torch.device, Carrier] = {torch.device("cpu"): HostCarrier(buffers)}
        self._scratch = Scratch(
            _directories(directory),
            buffers=buffers,
            capacity=None if capacity is None else parse_size(capacity),
            write_cap=None if write_cap is None else parse_size(write_cap),
            checksums=checksums,
            syscalls=_gds_syscalls(checksums=checksums) if gds else None,
        )
        self._gds = gds
        self._queue = TransferQueue(workers=workers, recorder=self._recorder)
        self._residency = Residency(
            budget=self._books,
            carriers=self._carriers,
            scratch=self._scratch,
            queue=self._queue,
            next_use=self._next_use,
            heap=self._heap,
            recorder=self._recorder,
        )
        self._close = weakref.finalize(self, _close, self._queue, self._scratch, self._carriers, os.getpid())
        self._dead: SimpleQueue[tuple[Entry, int]] = SimpleQueue()
        self._excluded: dict[int, StorageRef] = {}
        self._seen: list[StorageRef] = []
        self._numbered: dict[int, Entry] = {}
        self._live_tokens = 0
        self._small_nbytes = self._small_peak = 0
        self._tally: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._recording = Recording()
        self._order = Order()
        self._plan: Plan | None = None
        self._planned_rates: Rates | None = None
        self._plans = 0
        self._last_calls: list[Call] = []
        self._steps = 0
        self._step = 0  # unlike _steps, this counts forwards without a backward too
        self._step_seconds = 0.0
        self._begun = time.perf_counter()
        self._stall_before = 0.0

    @property
    def report(self) -> SpillReport:
        """What was done so far."""
        with self._residency.lock:
            self._drain()
        counters, tally = self._recorder.counters, self._tally
        return SpillReport(
            steps=self._steps,
            saved_nbytes=tally["saved"],
            unique_nbytes=tally["unique"],
            excluded_nbytes=tally["excluded"],
            kept=dict(self._kept),
            spilled_nbytes=int(counters.get("spilled_bytes", 0)),
            written_nbytes=self._scratch.written,
            read_nbytes=int(counters.get("read_bytes", 0)),
            forwarded_nbytes=tally["forwarded"],
            live_nbytes=self._books.held(self._tier),
            peak_nbytes=self._books.peak(self._tier),
            budget=self.budget,
            stall_seconds=self._residency.stall_seconds,
            step_seconds=self._step_seconds,
            planned_peak_nbytes=self._plan and self._plan.peak + self._overhead,
            planned_stall_seconds=self._plan and self._plan.stall_seconds,
            least_budget=self._plan and self._with_overhead(self._plan.least_budget),
            plans=self._plans,
        )

    @property
    def _tier(self) -> Tier:
        """The tier that is short: the device where there is one."""
        return "device" if len(self._carriers) > 1 else "host"

    def close(self) -> None:
        """Stop the threads, close and free the spill files. What was spilled and not yet unpacked is lost."""
        self._close()
        self._heap.close()

    def __enter__(self) -> Self:
        self._check_usable()
        if getattr(_active, "hooks", None) is not None:
            raise SpillMisuse("a spill is already active on this thread; one around the whole loop is enough")
        with self._residency.lock:
            self._drain()
            if self._recording.calls:
                self._finish_step()
            self._begun, self._stall_before = time.perf_counter(), self._residency.stall_seconds
            self._exclude_parameters()
        _active.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        _active.hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, _active.hooks = _active.hooks, None
        hooks.__exit__(kind, error, trace)
        with self._residency.lock:
            self._drain()
            if self._live_tokens == 0 and self._recording.calls:
                self._finish_step()

    # -- the hooks ----------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> _Kept | _Token:
        self._check_usable()
        self._residency.tell()
        self._tally["saved"] += tensor.nbytes if tensor.layout is torch.strided else 0
        reason = why_kept(tensor) or self._why_excluded(tensor)
        if reason is not None:
            self._kept[reason] += 1
            return _Kept(tensor)
        token, is_new = self._enter(tensor)
        if is_new:
            self._hold(token.entry, tensor.untyped_storage())
        if self._order.turns:  # the peak of the step is near
            self._heap.trim()
        else:
            self._heap.trim_if_due()
        return token

    def _unpack(self, packed: _Kept | _Token) -> torch.Tensor:
        if isinstance(packed, _Kept):
            check_version(packed.tensor, packed.version)
            if why_kept(packed.tensor) is None:
                own_gradients(packed.tensor)
            return packed.tensor
        self._check_usable()
        packed.view.check()
        entry = packed.entry
        with self._residency.lock:
            self._drain()
            self._note_unpack(packed)
        try:
            storage = self._residency.materialise(entry)
        except BudgetExceeded as error:
            raise self._name_cause(error) from None
        if entry.extent is not None:
            _refuse_node()
        with self._residency.lock:
            if entry.tokens == 1 or (self._order.holds and self._next_use(entry) == math.inf):
                self._residency.let_go(entry)
            upcoming = self._upcoming(entry)
        self._residency.prefetch(upcoming)
        tensor = packed.view.over(storage)
        own_gradients(tensor)
        return tensor

    def _upcoming(self, entry: Entry) -> list[Entry]:
        numbers = islice(self._order.upcoming(entry.number), _PREFETCH_LOOKAHEAD)
        return [self._numbered[number] for number in numbers if number in self._numbered]

    def _enter(self, tensor: torch.Tensor) -> tuple[_Token, bool]:
        """A token for a tensor, over the entry of its storage or a new one."""
        view = SavedView(tensor)
        storage = tensor.untyped_storage()
        with self._residency.lock:
            self._drain()
            if self._is_step_over():
                self._finish_step()
            entry = self._residency.find(storage_key(tensor), view)
            is_new = entry is None
            if entry is None:
                entry = self._new_entry(storage, view)
            elif entry.can_spill and entry.step == self._step:
                self._recording.save_again(entry.number)
                self._order.advance(entry.number)
            entry.tokens += 1
            self._live_tokens += 1
        return _Token(self, entry, view), is_new

    def _new_entry(self, storage: torch.UntypedStorage, view: SavedView) -> Entry:
        nbytes = storage.nbytes()
        can_spill = nbytes >= max(self._min_bytes, 1)
        entry = Entry(storage, view, self._carrier(storage.device), step=self._step, can_spill=can_spill)
        if can_spill:
            entry.number = self._recording.add(entry.window, self._elapsed())
            self._numbered[entry.number] = entry
            self._order.advance(entry.number)
        else:
            self._small_nbytes += nbytes
            self._small_peak = max(self._small_peak, self._small_nbytes)
        self._seen.append(entry.ref)
        self._tally["unique"] += nbytes
        self._residency.add(entry)
        return entry

    def _carrier(self, device: torch.device) -> Carrier:
        if device not in self._carriers and self._gds:
            self._carriers[device] = GdsCarrier(device, self._books)
        elif device not in self._carriers:
            self._carriers[device] = CudaCarrier(device, _ring(self.budget))
        return self._carriers[device]

    def _hold(self, entry: Entry, storage: torch.UntypedStorage) -> None:
        try:
            self._residency.admit(entry, storage)
        except BudgetExceeded as error:
            # The forward goes on without these bytes, so that the backward can say which budget would do.
            entry.lost = error.with_traceback(None)  # whose frames would keep what was refused
            return
        if not entry.can_spill:
            return
        if self._order.holds and self._plan is not None:
            if entry.number in self._plan.spill:
                self._residency.write(entry)
        elif self._books.held(entry.carrier.tier) > self.budget // 2:
            self._residency.write_all_but(self.budget // 2)

    def _note_unpack(self, token: _Token) -> None:
        entry = token.entry
        if entry.alive() is not None and entry.extent is None:
            self._tally["forwarded"] += entry.nbytes
        if entry.can_spill and entry.step == self._step:
            self._end_use(entry, token.unpacked)
            token.unpacked = self._recording.unpack(entry.number, self._elapsed())
            self._order.advance(~entry.number)

    # -- the ends of lives --------------------------------------------------------------------------------------

    def _bury(self, entry: Entry, unpacked: int) -> None:
        """Called by a dying token, maybe in the middle of our own code on this thread: so it never waits."""
        self._dead.put((entry, unpacked))
        if self._residency.lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._residency.lock.release()

    def _drain(self) -> None:
        """Take note of dead tokens. The caller has the lock."""
        while True:
            try:
                entry, unpacked = self._dead.get_nowait()
            except Empty:
                return
            self._live_tokens -= 1
            entry.tokens -= 1
            self._end_use(entry, unpacked)
            if entry.tokens == 0:
                self._retire(entry)
            if self._live_tokens == 0:
                for carrier in self._carriers.values():
                    carrier.buffers.trim()

    def _end_use(self, entry: Entry, unpacked: int) -> None:
        if unpacked >= 0 and entry.step == self._step:
            self._recording.end_use(entry.number, unpacked, self._elapsed())

    def _retire(self, entry: Entry) -> None:
        self._residency.retire(entry)
        if not entry.can_spill:
            self._small_nbytes -= entry.nbytes
        elif entry.step == self._step:
            self._recording.release(entry.number, self._elapsed())
            del self._numbered[entry.number]

    # -- steps and plans ----------------------------------------------------------------------------------------

    def _is_step_over(self) -> bool:
        """Whether the call under way begins a new step: nothing saved before is wanted any more."""
        ncalls = len(self._recording.calls)
        return (ncalls > 0 and self._live_tokens == 0) or ncalls > _LONGEST_STEP

    def _finish_step(self) -> None:
        recording, stall = self._recording, self._residency.stall_seconds - self._stall_before
        seconds = time.perf_counter() - self._begun
        if recording.unpacks:
            self._steps += 1
            self._step_seconds += seconds
            self._learn(recording, stall > _STALL_ALLOWED * seconds)
        self._order.restart()
        self._exclude_survivors()
        self._recording, self._numbered = Recording(), {}
        self._step += 1
        self._heap.end_step()
        if self._step % _STEPS_TO_REACH == 0:
            self._scratch.trim_unreached()
        self._begun, self._stall_before = time.perf_counter(), self._residency.stall_seconds

    def _learn(self, recording: Recording, stalled: bool) -> None:
        """Plan for the first step, for a new order seen twice, and where the disk is not what the plan believes."""
        repeated, self._last_calls = recording.calls == self._last_calls, recording.calls
        if recording.calls == self._order.calls:
            if stalled and self._rates_changed():
                self._replan(recording)
        elif repeated or not self._order.calls:
            self._order = Order(recording.calls)
            self._replan(recording)

    def _replan(self, recording: Recording) -> None:
        self._planned_rates = self._measured_rates()
        self._plans += 1
        try:
            self._plan = make_plan(
                recording.trace(), budget=self.budget - self._overhead, rates=self._planned_rates
            )
        except (BudgetExceeded, InvalidInput):  # the budget holds without a plan, though with more waiting
            self._plan = None

    @property
    def _overhead(self) -> int:
        """Bytes of the budget that no plan can use: small tensors, and what pages round up."""
        return self._small_peak + _page(self.budget)

    def _with_overhead(self, needed: int) -> int:
        return needed + self._small_peak + _page(needed)

    def _measured_rates(self) -> Rates:
        known = machine.cached_rates(self._scratch.directory)
        write = self._queue.rate("write") or (known.write if known else 1e9)
        read = self._queue.rate("read") or (known.read if known else write)
        return Rates(read_bytes_per_second=read, write_bytes_per_second=write)

    def _rates_changed(self) -> bool:
        """Whether the disk is a fifth faster or slower than the plan believes."""
        now, then = self._measured_rates(), self._planned_rates
        if then is None:
            return True
        pairs = (
            (now.read_bytes_per_second, then.read_bytes_per_second),
            (now.write_bytes_per_second, then.write_bytes_per_second),
        )
        return any(not 0.8 < a / b < 1.25 for a, b in pairs)

    def _next_use(self, entry: Entry) -> float:
        return self._order.next_use(entry.number) if entry.step == self._step else math.inf

    def _elapsed(self) -> float:
        """Seconds of compute since the step began, without our own stalls."""
        return time.perf_counter() - self._begun - (self._residency.stall_seconds - self._stall_before)

    # -- what is never written ----------------------------------------------------------------------------------

    def _why_excluded(self, tensor: torch.Tensor) -> str | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return "empty"
        if storage_key(tensor) not in self._excluded:
            return None
        self._tally["excluded"] += tensor.nbytes
        return "parameter or long-lived"

    def _exclude_parameters(self) -> None:
        if self._model is None:
            return
        tensors = [*self._model.parameters(), *self._model.buffers()]
        refs = [
            StorageRef(tensor.untyped_storage()) for tensor in tensors if why_kept(tensor.detach()) is None
        ]
        self._excluded = {ref.key: ref for ref in refs}

    def _exclude_survivors(self) -> None:
        """Without a model: what is alive after its step is no activation."""
        if self._model is None:
            survivors = [ref for ref in (*self._excluded.values(), *self._seen) if ref.alive() is not None]
            self._excluded = {ref.key: ref for ref in survivors}
        else:
            self._exclude_parameters()
        self._seen = []

    # -- budgets that cannot be met -----------------------------------------------------------------------------

    def _name_cause(self, error: BudgetExceeded) -> BudgetExceeded | TierFull:
        """Why there is no room: a disk that takes no more, or a budget below what the backward under way needs."""
        if self._residency.trouble is not None:
            return TierFull(
                f"the disk takes no more activations ({self._residency.trouble}), and a budget of "
                f"{format_size(self.budget)} does not hold all of them: name a directory with more room (--disk), "
                "allow more of it (--disk-capacity, --write-cap), or give a larger budget"
            )
        node = running_node()
        demands = [self._demand(packed) for packed in packed_by_node(node)] if node is not None else []
        least = self._with_overhead(max([*demands, error.asked])) + self._residency.escaped()
        hint = "Each backward step needs that much in memory at once; a smaller batch or sequence needs less."
        if node is not None and node.name().startswith("CompiledFunction"):
            hint = (
                "A compiled graph asks for all that it saved at once: compile single layers, not the model."
            )
        return BudgetExceeded(error.asked, self.budget, error.held, least, hint=hint)

    def _demand(self, packed: list[object]) -> int:
        entries = {token.entry for token in packed if isinstance(token, _Token)}
        return sum(entry.window for entry in entries if entry.can_spill)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise SpillMisuse("this spill belongs to the process that made it; a forked child needs its own")
        if not self._close.alive:
            raise SpillMisuse("this spill is closed; make a new one")


def _read_buffers(books: Budget, budget: int) -> Lender:
    """Where the host's bytes come back to: blocks of the tensor pool, or a slab where there is none."""
    capacity, holder = 4 * budget + 64 * HUGE_PAGE, "read buffers"
    if pool.install() is not None:
        return Blocks(books, capacity, holder)
    return Slab(capacity, budget=books, holder=holder, page=_page(budget))


def _ring(budget: int) -> Slab:
    """What a GPU's bytes pass through: pinned, and so all of it at once.

    It has books of its own: in those of the host it would leave nothing for what is saved there.
    """
    page = HUGE_PAGE if budget >= 32 * HUGE_PAGE else BLOCK
    return Slab(
        budget // page * page, budget=Budget(host=budget), holder="pinned ring", prefault=True, page=page
    )


def _page(budget: int) -> int:
    """Bytes of read buffer committed at once: huge pages, unless they would be coarse beside the budget."""
    return HUGE_PAGE if budget >= 32 * HUGE_PAGE and pool.install() is None else BLOCK


def _gds_syscalls(*, checksums: bool) -> GdsSyscalls:
    if checksums:
        raise InvalidInput(
            "checksums are computed in RAM, where GPUDirect Storage brings nothing: choose one"
        )
    if not torch.cuda.is_available():
        raise InvalidInput("GPUDirect Storage needs a CUDA device, and PyTorch sees none here")
    return GdsSyscalls(torch.device("cuda", torch.cuda.current_device()))


def _refuse_node() -> None:
    """Raise for the one operation of PyTorch that fills a tensor after saving it, without counting the edit.

    Every hook that copies, `save_on_cpu` too, gives it back bytes from before they were filled.

    Raises:
        UnsupportedModel: it is running.
    """
    node = running_node()
    if node is not None and node.name() == "RreluWithNoiseBackward0":
        raise UnsupportedModel(
            "rrelu saves its noise before it draws it, so a spilled copy would be wrong; "
            "use leaky_relu, or raise min_bytes above the size of this activation"
        )


def _directories(given: str | Path | list[str | Path] | None) -> list[str | Path]:
    if given is None:
        return [machine.home() / "spill"]
    return given if isinstance(given, list) else [given]


def _close(queue: TransferQueue, scratch: Scratch, carriers: dict[torch.device, Carrier], owner: int) -> None:
    if os.getpid() == owner:  # a forked child has none of the threads, and the files are not its own
        queue.close(timeout=5.0)
        scratch.close()
        for carrier in carriers.values():
            carrier.buffers.close()
