"""Training while disks fill up, fail and lie, and while processes fork: the right numbers, or a typed error."""

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from undercroft import ActivationSpill, CorruptRecord, SpillMisuse, TierFull, TransferFailed
from undercroft.store.slab import Lease
from undercroft.training.carrier import HostCarrier
from undercroft.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("nothing_left")

STEPS = 4
WIDTH = 256  # of a layer; with as many rows, a saved activation has 256 KiB
LAYERS = 12

Losses = list[torch.Tensor]
Step = tuple[torch.Tensor, list[torch.Tensor]]


def build() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())])


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        yield torch.randn(WIDTH, WIDTH, generator=generator)


def train(
    context: AbstractContextManager[object], model: nn.Module, inputs: Iterator[torch.Tensor]
) -> list[Step]:
    """Losses and gradients of each step."""
    steps: list[Step] = []
    for batch in inputs:
        with context:
            loss = model(batch).square().mean()
            loss.backward()
        steps.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return steps


def same(one: list[Step], other: list[Step]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) and all(map(torch.equal, ga, gb))
        for (a, ga), (b, gb) in zip(one, other, strict=True)
    )


@pytest.fixture
def spill() -> Iterator[Callable[..., ActivationSpill]]:
    """``spill(model, directory, budget)``: closed at the end."""
    made: list[ActivationSpill] = []

    def make(model: nn.Module, directory: Path, budget: int, **options) -> ActivationSpill:
        made.append(ActivationSpill(model, budget, directory, 64 * KIB, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def disk(tmp_path: Path, mount) -> tuple[Path, Path]:
    """A small disk of our own: its directory to spill in, and the file that is its device."""
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    return mount("ext4", "loop", image) / "spill", image


def spill_file(directory: Path) -> Path:
    """The descriptor of this process that is open on the nameless file below a directory."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    (found,) = [
        link for link in links if os.readlink(link).startswith(f"{directory}/spill-") and link.is_file()
    ]
    return found


@pytest.mark.root
def test_a_full_disk_changes_no_number_where_the_budget_has_room(mount, spill) -> None:
    plain = train(nullcontext(), build(), batches())
    model = build()
    full = spill(model, mount("tmpfs", "size=1m,mode=700"), 8 * MIB)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(train(full, model, batches()), plain)
    assert [str(warning.category) for warning in caught] == [str(RuntimeWarning)]
    assert "spilling stopped" in str(caught[0].message)
    assert "No space left" in str(caught[0].message)
    assert full.report.peak_nbytes <= 8 * MIB


@pytest.mark.root
def test_a_full_disk_is_the_cause_that_is_named_where_the_budget_has_no_room(mount, spill) -> None:
    model = build()
    full = spill(model, mount("tmpfs", "size=64k,mode=700"), 2 * MIB)
    with warnings.catch_warnings(), full:
        warnings.simplefilter("ignore")
        loss = model(next(batches())).square().mean()
        with pytest.raises(TierFull, match="name a directory with more room"):
            loss.backward()


def forward_and_harm(
    full: ActivationSpill, model: nn.Module, harm: Callable[[], None], kind: type[Exception]
) -> Exception:
    """A forward, some harm to what it spilled, and the error that the backward must end with."""
    with full:
        loss = model(next(batches())).square().mean()
        assert full._queue.drain(30)
        assert full.report.written_nbytes > 2 * MIB
        harm()
        with pytest.raises(kind) as caught:
            loss.backward()
    return caught.value


def check_no_wrong_gradient(model: nn.Module) -> None:
    plain = build()
    plain(next(batches())).square().mean().backward()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is None or torch.equal(got.grad, wanted.grad)
    assert any(parameter.grad is None for parameter in model.parameters())


@pytest.mark.root
def test_a_device_error_in_the_backward_is_typed_and_gives_no_wrong_gradient(disk, spill) -> None:
    directory, device = disk
    model = build()
    error = forward_and_harm(
        spill(model, directory, MIB), model, lambda: os.truncate(device, MIB), TransferFailed
    )
    assert f"spill file in {directory}: Input/output error" in str(error)
    check_no_wrong_gradient(model)


def test_a_flipped_bit_is_found_before_it_reaches_a_gradient(tmp_path: Path, spill) -> None:
    model = build()
    directory = tmp_path / "spill"

    def flip_bits() -> None:
        fd = os.open(spill_file(directory), os.O_RDWR)
        for offset in range(0, 16 * MIB, 64 * KIB):
            if byte := os.pread(fd, 1, offset + 100):
                os.pwrite(fd, bytes([byte[0] ^ 1]), offset + 100)
        os.fsync(fd)
        os.close(fd)

    error = forward_and_harm(spill(model, directory, MIB, checksums=True), model, flip_bits, CorruptRecord)
    assert "checksum differs" in str(error)
    check_no_wrong_gradient(model)


def test_a_truncated_file_is_found_before_it_reaches_a_gradient(tmp_path: Path, spill) -> None:
    model = build()
    directory = tmp_path / "spill"
    error = forward_and_harm(
        spill(model, directory, MIB), model, lambda: os.truncate(spill_file(directory), 0), CorruptRecord
    )
    assert "shorter than its index" in str(error)
    check_no_wrong_gradient(model)


def test_training_goes_on_after_an_error(tmp_path: Path, spill) -> None:
    model = build()
    full = spill(model, tmp_path / "spill", MIB)
    forward_and_harm(full, model, lambda: os.truncate(spill_file(tmp_path / "spill"), 0), CorruptRecord)
    model.zero_grad(set_to_none=True)
    assert same(train(full, model, batches()), train(nullcontext(), build(), batches()))


class Crowded(HostCarrier):
    """A device that has no room for some of what comes back, as a GPU has not where others use it too."""

    def __init__(self, carrier: HostCarrier, first: int, count: int) -> None:
        super().__init__(carrier.buffers)
        self._refused, self._received = range(first, first + count), 0

    def receive(self, lease: Lease, head: int, nbytes: int) -> torch.UntypedStorage:
        self._received += 1
        if self._received in self._refused:
            raise torch.OutOfMemoryError("no room")
        return super().receive(lease, head, nbytes)


@pytest.mark.parametrize("first", [1, 8])
def test_training_goes_on_after_a_device_had_no_room(tmp_path: Path, spill, first: int) -> None:
    model, cpu = build(), torch.device("cpu")
    full = spill(model, tmp_path / "spill", MIB)
    full._carriers[cpu] = Crowded(full._carriers[cpu], first, 40)
    with full:
        loss = model(next(batches())).square().mean()
        with pytest.raises(TransferFailed, match="no room"):
            loss.backward()
    full._carriers[cpu] = HostCarrier(full._carriers[cpu].buffers)
    check_no_wrong_gradient(model)
    del loss
    model.zero_grad(set_to_none=True)
    assert same(train(full, model, batches()), train(nullcontext(), build(), batches()))
    assert not full._residency._moves


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_loader_workers_inside_the_context_change_nothing(tmp_path: Path, spill) -> None:
    dataset = TensorDataset(torch.randn(4 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))

    def loader() -> Iterator[torch.Tensor]:
        for _ in range(2):  # new workers, forked while what was spilled is on its way
            with_workers = DataLoader(dataset, WIDTH, num_workers=2, multiprocessing_context="fork")
            for (batch,) in with_workers:
                yield batch

    plain = train(nullcontext(), build(), loader())
    model = build()
    full = spill(model, tmp_path / "spill", MIB)
    with full:
        assert same(train(nullcontext(), model, loader()), plain)
    assert full.report.written_nbytes > MIB
    assert len(list((tmp_path / "spill").iterdir())) == 1, "no worker took it away"


def run(script: str, directory: Path) -> subprocess.CompletedProcess:
    """Run a script in an interpreter of its own, with a model and a spill."""
    prelude = textwrap.dedent(
        """
        import gc, os, sys, torch
        from torch import nn
        from undercroft import ActivationSpill, SpillMisuse
        torch.manual_seed(0)
        torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
        layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.GELU())]
        model, x = nn.Sequential(*layers), torch.randn(256, 256)
        spill = ActivationSpill(model, 1 << 20, sys.argv[1], 1 << 16)
        """
    )
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c"]
    command += [prelude + textwrap.dedent(script), str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_forked_child_is_refused_and_its_exit_harms_nothing(tmp_path: Path) -> None:
    finished = run(
        """
        with spill:
            loss = model(x).square().mean()
            child = os.fork()
            if child == 0:
                refused = 0
                for call in (lambda: model(x), loss.backward, spill.__enter__):
                    try:
                        call()
                    except SpillMisuse as error:
                        refused += "process" in str(error)
                del loss, call
                gc.collect()  # what was saved dies in the child
                spill.close()
            else:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                loss.backward()
        if child == 0:
            sys.exit(refused - 3)  # an ordinary end, with destructors and exit handlers
        assert len(os.listdir(sys.argv[1])) == 1
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(x).square().mean().backward()
        print(all(map(torch.equal, gradients, [parameter.grad for parameter in model.parameters()])))
        spill.close()
        """,
        tmp_path / "spill",
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "True\n", "")
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize(
    "where",
    [
        "with spill: loss = model(x).square().mean()",
        "with spill: model(x).square().mean().backward()",
        "spill.__enter__(); loss = model(x).square().mean()",
    ],
)
def test_an_interpreter_that_forgot_to_close_exits_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    finished = run(where, tmp_path / "spill")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_closed_spill_says_so_in_the_backward(tmp_path: Path, spill) -> None:
    model = build()
    full = spill(model, tmp_path / "spill", MIB)
    with full:
        loss = model(next(batches())).square().mean()
    full.close()
    with pytest.raises(SpillMisuse, match="closed"):
        loss.backward()
