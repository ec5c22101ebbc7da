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


def test_trim_gives_back_the_oldest_and_keeps_what_it_is_told() -> None:
    program = """
blocks = [torch.empty(n * MIB, dtype=torch.uint8) for n in (2, 3, 4, 5)]
while blocks:
    del blocks[0]
assert p.use().waiting == 14 * MIB, p.use()
assert p.trim(5 * MIB) == 9 * MIB
five = torch.empty(5 * MIB, dtype=torch.uint8)
assert p.use().waiting == 0, p.use()
del five
assert p.trim() == 5 * MIB
print(p.use().waiting, p.use().used)
"""
    assert run(program) == "0 0"


def test_trim_gives_back_whole_huge_pages_of_a_block_and_the_rest_of_it_stays() -> None:
    program = """
big = torch.ones(8 * MIB, dtype=torch.uint8)
del big
assert p.trim(5 * MIB) == 4 * MIB
rest = torch.empty(4 * MIB, dtype=torch.uint8)
print(p.use().waiting, rest.data_ptr() % (2 * MIB), bool((rest == 1).all()))
"""
    assert run(program) == "0 0 True"


def test_what_even_the_peak_did_not_need_is_given_back() -> None:
    program = """
one, two = torch.empty(8 * MIB, dtype=torch.uint8), torch.empty(8 * MIB, dtype=torch.uint8)
del one, two
p.use()
one = torch.empty(4 * MIB, dtype=torch.uint8)
del one
assert p.trim_to_peak() == 12 * MIB, p.use()
print(p.use().waiting // MIB)
"""
    assert run(program) == "4"


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


def test_a_request_that_finds_none_of_its_size_is_put_together_from_others() -> None:
    program = """
import re
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
parts = [torch.full((n * MIB,), n, dtype=torch.uint8) for n in (6, 16, 42)]
full = resident()
del parts
assert p.use().waiting == 64 * MIB, p.use()
whole = torch.empty(64 * MIB, dtype=torch.uint8)
assert p.use().waiting == 0, p.use()
assert abs(resident() - full) < 4 * MIB
old = [int((whole == n).sum()) // MIB for n in (6, 16, 42)]
p.trim()
whole.fill_(7)
del whole
small = [torch.empty(2 * MIB, dtype=torch.uint8) for _ in range(32)]
assert all(bool((each == 7).all()) for each in small) and len({each.data_ptr() for each in small}) == 32
print(old)
"""
    assert run(program) == "[6, 16, 42]"


def test_what_is_less_than_a_huge_page_is_taken_from_what_is_left_of_others() -> None:
    program = """
parts = [torch.full((n * MIB,), n, dtype=torch.uint8) for n in (5, 4)]
del parts
whole = torch.empty(9 * MIB, dtype=torch.uint8)
print(p.use().waiting, [int((whole == n).sum()) // MIB for n in (5, 4)])
"""
    assert run(program) == "0 [5, 4]"


def test_what_is_in_use_is_never_taken() -> None:
    program = """
import random
random.seed(1)
live = {}
for step in range(3000):
    if live and random.random() < 0.5:
        value, tensor = live.popitem() if random.random() < 0.5 else (k := random.choice(list(live)), live.pop(k))
        assert bool((tensor == value).all()), step
    else:
        nbytes = random.randrange(MIB, 9 * MIB) if random.random() < 0.5 else random.randrange(1, 8) * MIB
        live[step % 251] = torch.full((nbytes,), step % 251, dtype=torch.uint8)
    if sum(t.nbytes for t in live.values()) > 200 * MIB:
        live.clear()
use = p.use()
assert use.used + use.waiting <= use.peak + 64 * MIB, use
print("ok")
"""
    assert run(program) == "ok"


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
