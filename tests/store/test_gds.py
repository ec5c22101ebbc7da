"""GPUDirect Storage: what it says where it is not to be had, and, on a GPU, bytes that come back equal."""

from pathlib import Path

import pytest
import torch

from undercroft import ActivationSpill
from undercroft.errors import InvalidInput


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="needs a CUDA device"):
        ActivationSpill(directory=tmp_path / "spill", gds=True)
    assert not (tmp_path / "spill").exists()


def test_checksums_would_need_the_copy_that_it_saves(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="choose one"):
        ActivationSpill(directory=tmp_path / "spill", gds=True, checksums=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_kvikio_or_a_driver_it_says_what_is_missing() -> None:
    from undercroft.store.gds import GdsSyscalls

    with pytest.raises(InvalidInput, match="needs kvikio"):
        GdsSyscalls(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("head", [0, 512, 4096 + 1536])
def test_device_bytes_come_back(tmp_path: Path, head: int) -> None:
    pytest.importorskip("kvikio")
    from undercroft.store.budget import Budget
    from undercroft.store.gds import DeviceBlocks, DeviceBytes, GdsSyscalls
    from undercroft.store.scratch import Scratch
    from undercroft.store.transfer import Priority, TransferQueue

    device = torch.device("cuda", torch.cuda.current_device())
    blocks = DeviceBlocks(Budget(device="64MiB"), "reads", torch.cuda.Stream(device))
    scratch = Scratch([tmp_path / "spill"], buffers=blocks, syscalls=GdsSyscalls(device))
    queue = TransferQueue()
    sent = torch.randint(256, (9 * 2**20 + 5,), dtype=torch.uint8, device=device)[head:]
    torch.cuda.synchronize()
    extent, out = scratch.spill(sent.data_ptr(), sent.numel(), keep=sent)
    queue.submit(out, Priority.WRITE).wait(60)
    fetched = scratch.fetch(extent)
    assert fetched is not None
    lease, back = fetched
    queue.submit(back, Priority.DEMAND).wait(60)
    came = torch.as_tensor(DeviceBytes(lease.address + extent.head, sent.numel()), device=device)
    assert torch.equal(came, sent)
    del came
    queue.close()
    scratch.close()
