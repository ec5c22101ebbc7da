"""Nothing outlives its use: tokens, reservations, disk, threads, descriptors; whatever ends a step, or the process."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from undercroft import ActivationSpill
from undercroft.training.identity import StorageRef

pytestmark = pytest.mark.usefixtures("nothing_left")


def stack() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(6)])


def loss_of(model: nn.Module, rows: int = 96) -> Tensor:
    return model(torch.randn(rows, 64)).sin().square().mean()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return stack()


@pytest.fixture
def spill(model: nn.Module, tmp_path: Path) -> Iterator[ActivationSpill]:
    spill = ActivationSpill(model, "128KiB", tmp_path, 64)
    yield spill
    spill.close()


def assert_nothing_live(spill: ActivationSpill) -> None:
    """After all that was under way has ended, nothing is held, on disk or wanted."""
    deadline = time.monotonic() + 30
    while spill.report.live_nbytes or spill._scratch.occupied or spill._residency._moves:
        with spill:  # a cancelled move ends on another thread
            pass
        assert time.monotonic() < deadline, spill.report
    assert not spill._residency._entries
    assert not spill._residency._by_key
    assert spill._live_tokens == 0


def plain_step(spill: ActivationSpill, model: nn.Module) -> None:
    with spill:
        loss_of(model).backward()


def forward_only(spill: ActivationSpill, model: nn.Module) -> None:
    with spill:
        loss_of(model)


def forward_fails(spill: ActivationSpill, model: nn.Module) -> None:
    with suppress(ZeroDivisionError), spill:
        _unfinished = loss_of(model)
        raise ZeroDivisionError


def backward_fails(spill: ActivationSpill, model: nn.Module) -> None:
    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    with suppress(ZeroDivisionError), spill:
        hidden = model[:3](torch.randn(96, 64))
        hidden.register_hook(fail)
        model[3:](hidden).square().mean().backward()


def unused_branch(spill: ActivationSpill, model: nn.Module) -> None:
    with spill:
        hidden = model[0](torch.randn(96, 64))
        _unused = model[1:](hidden.exp())
        hidden.sin().mean().backward()


def graph_in_a_cycle(spill: ActivationSpill, model: nn.Module) -> None:
    """Only the garbage collector frees this graph, at a moment of its own."""
    with spill:
        holder: list[object] = [loss_of(model)]
        holder.append(holder)
    del holder
    gc.collect()


def retained(spill: ActivationSpill, model: nn.Module) -> None:
    with spill:
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)


def deleted_on_another_thread(spill: ActivationSpill, model: nn.Module) -> None:
    with spill:
        losses = [loss_of(model)]
    thread = threading.Thread(target=losses.clear)
    thread.start()
    thread.join()


ENDS: list[Callable[[ActivationSpill, nn.Module], None]] = [
    plain_step,
    forward_only,
    forward_fails,
    backward_fails,
    unused_branch,
    graph_in_a_cycle,
    retained,
    deleted_on_another_thread,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_however_a_step_ends_nothing_stays(
    end: Callable[[ActivationSpill, nn.Module], None], spill: ActivationSpill, model: nn.Module
) -> None:
    for _ in range(3):
        end(spill, model)
    assert_nothing_live(spill)
    plain_step(spill, model)  # and it goes on working
    assert spill.report.spilled_nbytes > 0
    assert_nothing_live(spill)


def test_mixed_ends_leave_nothing(spill: ActivationSpill, model: nn.Module) -> None:
    for end in ENDS + ENDS[::-1]:
        end(spill, model)
    assert_nothing_live(spill)


def test_many_steps_do_not_grow(spill: ActivationSpill, model: nn.Module) -> None:
    seen: list[tuple[int, int, int, int]] = []
    for step in range(200):
        with spill:
            loss_of(model[:2], rows=256).backward()
        model.zero_grad()
        if step % 50 == 9:
            gc.collect()
            fds = len(list(Path("/proc/self/fd").iterdir()))
            sizes = len(spill._seen), len(spill._excluded), len(spill._numbered), spill._dead.qsize()
            seen.append((spill._scratch.file_nbytes, threading.active_count(), fds, sum(sizes)))
    assert_nothing_live(spill)
    assert spill.report.steps == 200
    assert len(set(seen)) == 1, seen


def test_saved_bytes_leave_memory_when_they_are_written(tmp_path: Path) -> None:
    """The storage itself dies: a spill that kept it would save nothing."""
    spill = ActivationSpill(None, "256KiB", tmp_path, 64)
    x = torch.randn(128, 128, requires_grad=True)
    with spill:
        outputs = [x.exp() for _ in range(12)]
        handles = [StorageRef(output.untyped_storage()) for output in outputs]
        total = torch.stack([output.sum() for output in outputs]).sum()
        del outputs
        alive = sum(handle.alive() is not None for handle in handles)
        assert alive * x.nbytes <= 256 * 1024
        total.backward()
    spill.close()


def test_closing_in_the_middle(model: nn.Module, tmp_path: Path) -> None:
    spill = ActivationSpill(model, "128KiB", tmp_path, 64)
    with spill:
        loss = loss_of(model)
        spill.close()
    with pytest.raises(RuntimeError, match="closed"):
        loss.backward()
    del loss
    spill.close()
    assert spill.report.live_nbytes == 0


def test_a_spill_that_is_dropped_ends_its_threads(model: nn.Module, tmp_path: Path) -> None:
    before = threading.active_count()
    spill = ActivationSpill(model, "128KiB", tmp_path, 64)
    plain_step(spill, model)
    del spill
    gc.collect()
    assert threading.active_count() == before


def test_gradients_outlive_the_spill(model: nn.Module, tmp_path: Path) -> None:
    """A gradient may be a view of a read buffer; closing must not take its bytes."""
    x = torch.randn(64, 64)
    weight = nn.Parameter(torch.zeros(64, 64))
    spill = ActivationSpill(None, "64KiB", tmp_path, 64)
    with spill:
        (weight * x.exp()).sum().backward()
    spill.close()
    del spill
    gc.collect()
    assert torch.equal(weight.grad, x.exp())


SCRIPT = """
    import sys, torch
    from torch import nn
    from undercroft import ActivationSpill
    spill = ActivationSpill(None, "256KiB", sys.argv[1], 64)
    x = torch.randn(128, 128, requires_grad=True)
    spill.__enter__()
    saved = [x.exp().sin() for _ in range(40)]
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("saved[0].sum().backward(); sys.modules['keeps'] = saved; sys.exit(3)", 3),
        ("import os; os._exit(4)", 4),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_the_interpreter_may_end_at_any_time(tmp_path: Path, end: str, code: int) -> None:
    script = textwrap.dedent(SCRIPT).format(end=end)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (code, "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the spill file has no name"
