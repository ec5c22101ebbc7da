"""Spilling from a GPU: the same numbers, a bounded ring of pinned memory. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

from undercroft import ActivationSpill
from undercroft.store.slab import HUGE_PAGE, Slab
from undercroft.training.carrier import CudaCarrier

pytestmark = pytest.mark.gpu


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU()) for _ in range(6)]
    return torch.nn.Sequential(*layers).cuda()


def gradients(net: torch.nn.Module, spill: ActivationSpill | None, delay: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2048, 512, device="cuda")
    if delay:  # a race shows when the work that fills what is saved has not even begun
        torch.cuda._sleep(delay)
    if spill is None:
        net(x).square().mean().backward()
    else:
        with spill:
            net(x).square().mean().backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return found


@pytest.mark.parametrize("gds", [False, True], ids=["ring", "gds"])
@pytest.mark.parametrize("delay", [0, 200_000_000])
def test_gradients_are_bit_identical(tmp_path: Path, delay: int, gds: bool) -> None:
    if gds:
        pytest.importorskip("kvikio")
    net = model()
    plain = gradients(net, None)
    spill = ActivationSpill(net, budget="16MiB", directory=tmp_path / "spill", min_bytes="64KiB", gds=gds)
    for _ in range(4):
        assert all(map(torch.equal, plain, gradients(net, spill, delay)))
    assert spill.report.spilled_nbytes > 0
    assert spill.report.read_nbytes > 0
    assert spill.report.peak_nbytes <= 16 * 1024**2
    spill.close()


def test_beside_what_is_saved_on_the_cpu(tmp_path: Path) -> None:
    """Such as a factor of no dimension; and the ring is of whole pages, of which the budget is not."""
    x, factor = torch.randn(2048, 512, device="cuda"), torch.tensor(3.0)

    def gradient(net: torch.nn.Module) -> torch.Tensor:
        net.zero_grad()
        (net(x) * factor).square().mean().backward()
        return next(grad.clone() for each in net.parameters() if (grad := each.grad) is not None)

    net = model()
    plain = gradient(net)
    spill = ActivationSpill(net, budget=16_000_000, directory=tmp_path / "spill", min_bytes="64KiB")
    for _ in range(3):
        with spill:
            assert torch.equal(gradient(net), plain)
    assert spill.report.spilled_nbytes > 0
    spill.close()


def test_device_memory_falls(tmp_path: Path) -> None:
    net = model()

    def peak(spill: ActivationSpill | None) -> int:
        gradients(net, spill)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(net, spill)
        return torch.cuda.max_memory_allocated() - before

    plain = peak(None)
    with_spill = ActivationSpill(net, budget="16MiB", directory=tmp_path / "spill", min_bytes="64KiB")
    assert peak(with_spill) < 0.8 * plain
    with_spill.close()


def test_a_copy_that_nobody_waits_for_keeps_its_memory() -> None:
    ring, device = Slab(HUGE_PAGE), torch.device("cuda", torch.cuda.current_device())
    carrier = CudaCarrier(device, ring)
    sent = torch.ones(2**20, dtype=torch.uint8, device=device)
    torch.cuda._sleep(200_000_000)
    mark = carrier.mark()
    parcel = carrier.send(sent.untyped_storage(), mark)
    assert parcel is not None
    assert not mark.query()
    assert ring.leased == 2**20
    del parcel
    assert mark.query()
    assert ring.leased == 0
    ring.close()
