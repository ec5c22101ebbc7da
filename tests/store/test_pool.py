"""The pool in front of PyTorch's CPU allocator: installed in processes of their own, because it stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from undercroft.store import pool

MIB = 1024**2


def run(program: str, **environment: str) -> str:
    """What a program prints in a fresh process in which a pool was asked for as `p`."""
    whole = f"import torch\nfrom undercroft.store import pool\np = pool.install()\nMIB = {MIB}\n{program}"
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", whole]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    if run("print(p is None)") == "True":
        pytest.skip("no C++ compiler here, so there is no pool")


def test_large_tensors_come_from_the_pool_and_small_ones_do_not() -> None:
    program = """
before = p.use().used
small = torch.empty(1000)
assert p.use().used == before
large = torch.empty(2 * MIB, dtype=torch.uint8)
print(p.use().used - before == 2 * MIB)
"""
    assert run(program) == "True"


def test_a_freed_block_serves_the_next_request_of_its_size() -> None:
    program = """
one = torch.empty(3 * MIB, dtype=torch.uint8)
address = one.data_ptr()
del one
assert p.use().waiting == 3 * MIB
print(torch.empty(3 * MIB, dtype=torch.uint8).data_ptr() == address)
"""
    assert run(program) == "True"


def test_what_waits_is_bounded_oldest_first_and_trim_gives_all_of_it_back() -> None:
    program = """
p.limit(8 * MIB)
blocks = [torch.empty(n * MIB, dtype=torch.uint8) for n in (2, 3, 4, 5)]
while blocks:
    del blocks[0]
assert p.use().waiting == 5 * MIB, p.use()
assert p.trim() == 5 * MIB
print(p.use().waiting, p.use().used)
"""
    assert run(program) == "0 0"


def test_memory_really_returns_to_the_system() -> None:
    program = """
import re
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = resident()
big = torch.ones(128 * MIB, dtype=torch.uint8)
full = resident()
del big
p.trim()
print(full - before > 120 * MIB, resident() - before < 8 * MIB)
"""
    assert run(program) == "True True"


def test_a_request_that_finds_none_of_its_size_pushes_out_as_many_bytes_of_others() -> None:
    program = """
p.limit(1024 * MIB)
blocks = [torch.empty(n * MIB, dtype=torch.uint8) for n in (49, 50, 51)]
while blocks:
    del blocks[0]
assert p.use().waiting == 150 * MIB, p.use()
fresh = torch.empty(52 * MIB, dtype=torch.uint8)
print(p.use().waiting // MIB)
"""
    assert run(program) == "51"


def test_onednn_may_free_what_either_allocator_gave() -> None:
    program = """
for rows in (8, 4096):
    x = torch.randn(rows, 512, requires_grad=True)
    torch.nn.functional.gelu(x).sum().backward()
print(torch.equal(x.grad, x.grad), p.use().used >= 4096 * 512 * 4)
"""
    assert run(program) == "True True"


def test_a_forked_child_can_allocate_and_free() -> None:
    program = """
import os, threading
stop = threading.Event()
def churn():
    while not stop.is_set():
        torch.empty(2 * MIB, dtype=torch.uint8)
torch.ones(1), torch.empty(1)  # a first call registers with atexit, and glibc's lock for that survives no fork
thread = threading.Thread(target=churn)
thread.start()
codes = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        torch.ones(2 * MIB, dtype=torch.uint8)
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(codes)
"""
    assert run(f"import warnings\nwarnings.simplefilter('ignore')\n{program}") == "[0, 0, 0, 0, 0]"


def test_results_are_the_same_bits_with_and_without() -> None:
    work = """
torch.manual_seed(0)
m = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
loss = m(torch.randn(1024, 512)).square().mean()
loss.backward()
print(loss.item().hex(), [float(q.grad.double().sum()).hex() for q in m.parameters()])
"""
    plain = subprocess.run(
        [sys.executable, "-c", f"import torch\n{work}"], capture_output=True, text=True, check=True
    )
    assert run(work) == plain.stdout.strip()


def test_without_a_compiler_there_is_none_and_the_heap_still_settles(tmp_path: Path) -> None:
    program = "from undercroft.store import heap\nprint(p, heap.settle())"
    environment = {"PATH": str(tmp_path), "UNDERCROFT_HOME": str(tmp_path / "home")}
    assert run(program, **environment).endswith("None True")


def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run("print(p is None)", UNDERCROFT_HOME=str(home)) == "False"
    (library,) = (home / "native").glob("*.so")
    library.chmod(0o722)
    assert run("print(p is None)", UNDERCROFT_HOME=str(home)) == "True"


def test_the_recipe_names_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERCROFT_HOME", str(tmp_path))
    assert pool.library().name.startswith("pool-")
