"""Training with spilling is bit-identical under DDP, FSDP2 and torch.compile, each in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

COMMON = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import torch, torch.distributed as dist
    from contextlib import nullcontext
    from torch import nn
    from undercroft import ActivationSpill
    torch.set_num_threads(1)
    directory, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def stack():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(4)])

    def local(tensor):
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()

    def train(prepare, spilling, budget="96KiB"):
        model = stack()
        ready = prepare(model)
        spill = ActivationSpill(model, budget, directory, 64)
        seen = []
        for step in range(4):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(96, 64)
            with spill if spilling else nullcontext():
                loss = ready(x).sin().square().mean()
                loss.backward()
            seen += [loss.detach(), *(local(p.grad) for p in model.parameters())]
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
        spill.close()
        if spilling:
            assert spill.report.read_nbytes > 0, spill.report
        return seen

    def check(prepare, budget="96KiB"):
        plain, spilled = train(prepare, False), train(prepare, True, budget)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(plain, spilled, strict=True))

    if world:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
"""
DDP = """
    check(nn.parallel.DistributedDataParallel)
    check(lambda model: nn.parallel.DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True))
    dist.destroy_process_group()
"""
FSDP = """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (world,))

    def shard(model):
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    check(shard, "160KiB")
    dist.destroy_process_group()
"""
COMPILED = """
    # a compiled graph is one node, which asks for all that it saved at once: so block by block
    check(lambda model: nn.Sequential(*[torch.compile(block, backend="{backend}") for block in model]), "208KiB")
"""


def run_ranks(tmp_path: Path, body: str, world: int) -> None:
    script = textwrap.dedent(COMMON) + textwrap.dedent(body)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(rank), str(world)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(world, 1))
    ]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in ranks]
    assert all(code == 0 for _, code in ended), "\n".join(error[-2000:] for error, _ in ended)


def test_replicated_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(tmp_path, DDP, 2)


def test_sharded(tmp_path: Path) -> None:
    run_ranks(tmp_path, FSDP, 1)


def test_compiled_without_code_generation(tmp_path: Path) -> None:
    run_ranks(tmp_path, COMPILED.format(backend="aot_eager"), 0)


@pytest.mark.slow  # a minute of compiling
def test_compiled_to_machine_code(tmp_path: Path) -> None:
    run_ranks(tmp_path, COMPILED.format(backend="inductor"), 0)
