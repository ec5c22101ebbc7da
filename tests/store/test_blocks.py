"""Read buffers that are blocks of the pool: in processes of their own, because the pool stays."""

import subprocess
import sys

import pytest

PROLOGUE = """
import gc
import torch
from undercroft.store import pool
from undercroft.store.blocks import Blocks
from undercroft.store.budget import Budget
MIB = 1024**2
p = pool.install()
budget = Budget(host=8 * MIB)
blocks = Blocks(budget, 4 * MIB, "reads")
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    asked = [sys.executable, "-c", "from undercroft.store import pool; print(pool.install() is None)"]
    if subprocess.run(asked, capture_output=True, text=True, check=True, timeout=120).stdout == "True\n":
        pytest.skip("no C++ compiler here, so there is no pool")


def test_a_lease_takes_the_block_a_tensor_left_and_a_tensor_takes_it_back() -> None:
    run("""
tensor = torch.empty(3 * MIB, dtype=torch.uint8)
address = tensor.data_ptr()
del tensor
lease = blocks.lease(3 * MIB - 5)
assert lease.address == address and lease.nbytes == 3 * MIB, (lease.address, address)
storage = lease.storage(0, 3 * MIB - 5)
assert (storage.data_ptr(), storage.nbytes()) == (address, 3 * MIB - 5)
del lease, storage
assert torch.empty(3 * MIB, dtype=torch.uint8).data_ptr() == address
""")


def test_no_mode_of_pytorch_touches_it() -> None:
    run("""
tensor = torch.full((3 * MIB,), 7, dtype=torch.uint8)
address = tensor.data_ptr()
del tensor
torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
with torch.device("meta"):
    lease = blocks.lease(3 * MIB)
assert lease.address == address
assert bool((torch.empty(0, dtype=torch.uint8).set_(lease.storage(0, 3 * MIB)) == 7).all())
""")


def test_its_bytes_are_reserved_until_the_last_view_dies() -> None:
    run("""
lease = blocks.lease(5 * MIB)
view = torch.empty(0, dtype=torch.uint8).set_(lease.storage(4096, MIB))[7:]
view.fill_(3)
del lease
assert blocks.leased == budget.held("host") == budget.holders("host")["reads"] == 5 * MIB
assert blocks.lease(4 * MIB) is None
assert bool((view == 3).all())
del view
assert blocks.leased == budget.held("host") == p.use().used == 0
assert blocks.lease(8 * MIB) is not None
""")


def test_small_leases_come_from_a_slab_of_single_pages() -> None:
    run("""
before = p.use().used
small, large = blocks.lease(5000), blocks.lease(MIB)
assert small.address % 4096 == large.address % 4096 == 0
assert p.use().used - before == MIB
assert blocks.leased == budget.held("host") == MIB + 8192
del small
assert blocks.leased == MIB
assert blocks.trim() == 8192
assert budget.held("host") == MIB
""")


def test_a_live_lease_outlives_close() -> None:
    run("""
storages = [blocks.lease(nbytes).storage(0, nbytes) for nbytes in (10, 2 * MIB)]
blocks.close()
for storage in storages:
    storage.fill_(9)
assert budget.held("host") == 2 * MIB + 4096
del storages, storage
assert budget.held("host") == 0 or blocks.trim() == 4096
""")
