"""What tests share: marks that say why they skip, a home of their own, mounts, proof that nothing is left."""

import gc
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import tqdm

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many processes as cores: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
tqdm.tqdm.monitor_interval = 0  # its thread lives as long as the process, and is nobody's leak

hypothesis.settings.register_profile("shared", deadline=None)  # cores are shared: a slow example is no bug
hypothesis.settings.load_profile("shared")

Mount = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow")
    parser.addoption("--network", action="store_true", help="run tests marked network")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--network"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    # A shell starts what runs in the background with SIGINT ignored, and programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark, (can_run, reason) in _CONDITIONS.items():
            if item.get_closest_marker(mark) and not can_run(config):
                item.add_marker(pytest.mark.skip(reason=reason))


@cache
def _has_gpu(_: pytest.Config) -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def _can_mount(_: pytest.Config) -> bool:
    tool = shutil.which("unshare")
    return (
        os.geteuid() == 0 and tool is not None and subprocess.run([tool, "--mount", "true"]).returncode == 0
    )


_CONDITIONS: dict[str, tuple[Callable[[pytest.Config], bool], str]] = {
    "gpu": (_has_gpu, "needs a CUDA device"),
    "network": (lambda config: bool(config.getoption("--network")), "needs the network: --network"),
    "slow": (lambda config: bool(config.getoption("--slow")), "slow: --slow"),
    "root": (_can_mount, "needs root and the right to mount"),
}


@pytest.fixture(scope="session", autouse=True)
def undercroft_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undercroft's directory for this run; the user's own is never touched."""
    home = tmp_path_factory.mktemp("home")
    os.environ["UNDERCROFT_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the bundled one, with its tokenizer, fewer layers and experts, and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from undercroft.bundled import model_folder

    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(
        model_folder("moe"), folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md", "*ing.json")
    )
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=2, num_experts=16, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves a thread or an open file behind; a thread about to end may end."""
    threads, files = set(threading.enumerate()), _open_files()
    yield
    gc.collect()
    started = [thread for thread in threading.enumerate() if thread not in threads]
    deadline = time.monotonic() + 5
    for thread in started:
        thread.join(max(0, deadline - time.monotonic()))
    left = [thread.name for thread in started if thread.is_alive()]
    assert not left, f"threads left: {left}"
    opened = {fd: target for fd, target in _open_files().items() if files.get(fd) != target}
    assert not opened, f"files left open: {opened}"


def _open_files() -> dict[str, str]:
    """Open descriptors and what they refer to."""
    files: dict[str, str] = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            files[link.name] = os.readlink(link)
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return files


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """``mount("tmpfs", "size=8m")`` is a fresh file system; mark the test ``root``."""
    points: list[Path] = []

    def mount_one(kind: str, options: str = "", source: str | Path = "none") -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        arguments = ["-o", options] if options else []
        subprocess.run(["mount", "-t", kind, *arguments, str(source), str(point)], check=True)
        points.append(point)
        return point

    yield mount_one
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", str(point)], check=True)
