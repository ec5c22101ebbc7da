"""Packing: what is written is the checkpoint's, whatever interrupts it, and nothing half-done is ever left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.moe.conftest import mixtral
from tests.moe.families import decorated, fill, tiny_config

from undercroft.errors import CorruptRecord, InvalidInput, SpillMisuse, TierFull, UnsupportedModel
from undercroft.models.checkpoint import Checkpoint
from undercroft.moe.pack import pack
from undercroft.moe.pack_report import PackProgress
from undercroft.units import MIB

Mount = Callable[..., Path]
EXPERTS = 3 * 16  # of the small models


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> Path:
    """A small model in two shards, with a tokenizer's files beside it."""
    folder = checkpoint(max_shard_size="1MB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.py").write_text("print('not copied')")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at(experts: int, act: Callable[[], Any]) -> Callable[[PackProgress], None]:
    """Do something when so many experts are packed."""
    return lambda progress: (
        act() if progress.experts == experts and progress.seconds_left is not None else None
    )


class Stop(Exception):
    """Raised to interrupt."""


def stop() -> None:
    raise Stop


def test_all_other_weights_and_files_are_copied_as_they_are(source: Path, tmp_path: Path) -> None:
    report = pack(source, tmp_path / "out")
    with Checkpoint(source) as whole, Checkpoint(tmp_path / "out") as dense:
        left_out = whole.keys() - dense.keys()
        assert len(left_out) == 3 * EXPERTS
        assert all(".experts." in name for name in left_out)
        loaded = safetensors.torch.load_file(tmp_path / "out" / "dense.safetensors")
        assert loaded.keys() == dense.keys() == whole.keys() - left_out
        assert all(torch.equal(tensor, whole.read(whole[name])) for name, tensor in loaded.items())
        assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in dense.values())
    assert report.dense_nbytes == (tmp_path / "out" / "dense.safetensors").stat().st_size
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not {"notes.py", "model.safetensors.index.json"} & content(tmp_path / "out").keys()


def test_it_tells_sizes_before_it_starts_and_time_after_each_expert(source: Path, tmp_path: Path) -> None:
    told: list[PackProgress] = []
    report = pack(source, tmp_path / "out", high="int8", low="int2", on_progress=told.append)
    assert [progress.experts for progress in told] == list(range(EXPERTS + 1))
    assert (told[0].nbytes, told[0].seconds_left) == (0, None)
    assert all(progress.seconds_left is not None for progress in told[1:])
    assert told[-1].seconds_left == 0
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.records"))
    assert told[-1].nbytes == on_disk == report.high_nbytes + report.low_nbytes
    assert {progress.all_nbytes for progress in told} == {on_disk + report.dense_nbytes}
    assert (report.layers, report.experts, report.kept_layers) == (3, EXPERTS, 0)
    assert report.stored_nbytes == EXPERTS * 3 * 64 * 32 * 4


def test_the_same_again_does_nothing(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = pack(source, tmp_path / "out", on_progress=lambda _: stop())
    assert report.kept_layers == report.layers
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


KILLED = """
    import os, signal, sys
    from undercroft.moe.pack import pack

    def kill(progress):
        if progress.experts == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    pack(sys.argv[1], sys.argv[2], on_progress=kill)
    """


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("experts", [0, 20, EXPERTS])
def test_killed_and_run_again_it_goes_on_where_it_was(source: Path, tmp_path: Path, experts: int) -> None:
    killed = run(KILLED, source, tmp_path / "out", experts)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    layers = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.records")}
    assert len(layers) == max(experts - 1, 0) // 16
    report = pack(source, tmp_path / "out")
    assert report.kept_layers == len(layers)
    assert all(path.stat().st_mtime_ns == time for path, time in layers.items())
    pack(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_was_left_at_any_file_is_taken_up(source: Path, tmp_path: Path) -> None:
    """As if killed between the two names of a record file, in the dense weights, or before the manifest."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(source, whole)
    with pytest.raises(Stop):
        pack(source, out, on_progress=at(1, stop))
    unfinished = (out / "undercroft-pack.json.unfinished").read_bytes()
    for gone in (["experts-00001.records.json"], ["dense.safetensors"], ["config.json"], []):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        (out / "undercroft-pack.json").unlink()
        (out / "undercroft-pack.json.unfinished").write_bytes(unfinished)
        for name in gone:
            (out / name).rename(out / f"{name}.partial")
        pack(source, out)
        assert content(out) == content(whole)


def test_an_exception_leaves_complete_layers_only(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(source, tmp_path / "out", on_progress=at(20, stop))
    assert sorted(content(tmp_path / "out")) == [
        "experts-00000.records",
        "experts-00000.records.json",
        "undercroft-pack.json.unfinished",
    ]


@pytest.mark.root
def test_a_disk_that_fills_up_keeps_complete_layers(source: Path, tmp_path: Path, mount: Mount) -> None:
    disk = mount("tmpfs", "size=4m")

    def fill_up() -> None:
        with (disk / "other").open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free))

    with pytest.raises(TierFull, match="No space left"):
        pack(source, disk / "out", on_progress=at(20, fill_up))
    assert "experts-00000.records.json" in content(disk / "out")
    assert not [name for name in content(disk / "out") if "00001" in name or name.endswith(".partial")]
    (disk / "other").unlink()
    assert pack(source, disk / "out").kept_layers == 1
    pack(source, tmp_path / "whole")
    assert content(disk / "out") == content(tmp_path / "whole")


@pytest.mark.root
def test_a_disk_too_small_is_refused_before_anything_is_written(source: Path, mount: Mount) -> None:
    disk = mount("tmpfs", "size=1536k")
    with pytest.raises(TierFull, match=r"takes 1\.53 MiB more, and 1\.50 MiB are free there"):
        pack(source, disk / "out")
    assert content(disk / "out") == {}
    pack(source, disk / "out", high="int8")


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    (file, *_) = sorted(source.glob("*.safetensors"))
    with pytest.raises(CorruptRecord, match="was changed while it was in use"):
        pack(source, tmp_path / "out", on_progress=at(20, lambda: os.utime(file)))
    assert "experts-00001.records" not in content(tmp_path / "out")
    with pytest.raises(CorruptRecord, match=r"qwen-0 was changed since .*unfinished was written"):
        pack(source, tmp_path / "out")


def test_a_destination_packed_otherwise_is_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out")
    before = content(tmp_path / "out")
    for options in ({"high": "int8"}, {"low": "int2"}, {"low": "none"}, {"group": 64}):
        with pytest.raises(InvalidInput, match="name another folder, or remove"):
            pack(source, tmp_path / "out", **options)
    other = tmp_path / "other"
    mixtral(1).save_pretrained(other)
    with pytest.raises(InvalidInput, match="holds qwen-0, or was begun otherwise"):
        pack(other, tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"holds \S+; name a folder that is new or empty"):
        pack(source, source)
    assert content(tmp_path / "out") == before


def test_two_at_once_are_kept_apart(source: Path, tmp_path: Path) -> None:
    def again() -> None:
        with pytest.raises(SpillMisuse, match="another process is packing into"):
            pack(source, tmp_path / "out")

    pack(source, tmp_path / "out", on_progress=at(20, again))


@pytest.mark.parametrize(
    "options",
    [{"high": "int2"}, {"high": "none"}, {"low": "int8"}, {"low": "bf16"}, {"group": 48}, {"high": "int4"}],
    ids=str,
)
def test_forms_that_are_not_offered(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        pack(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match="no experts"):
        pack(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(InvalidInput, match="there is no folder"):
        pack(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_quantised_already_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="is quantised already"):
        pack(source, tmp_path / "out")


def test_columns_that_no_group_divides_are_said(tmp_path: Path) -> None:
    (family,) = [each for each in decorated() if each[0].model_type == "mixtral"]
    config: Any = tiny_config(family[0])
    config.intermediate_size = 40
    model = family[1](config)
    fill(model, 0)
    model.save_pretrained(tmp_path / "model")
    report = pack(tmp_path / "model", tmp_path / "out", group=128)
    assert report.not_quantised == tuple(
        f"model.layers.{layer}.mlp.experts.down_proj in int4" for layer in range(2)
    )


MEASURED = """
    import sys
    import transformers
    from undercroft.moe.pack import pack

    def kib(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

    transformers.logging.set_verbosity_error()
    pack(sys.argv[1], sys.argv[2])
    before = kib("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    report = pack(sys.argv[3], sys.argv[4])
    print(report.stored_nbytes, (kib("VmHWM") - before) << 10)
    """


def test_memory_does_not_grow_with_the_model(source: Path, tmp_path: Path) -> None:
    """300 MB of experts, 6 MB each; all code and its imports run once before, on a small model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 12}
    rest: dict[str, Any] = {
        "vocab_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **rest, num_hidden_layers=4))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.uniform_(weight)
    model.save_pretrained(tmp_path / "large")
    del model
    measured = run(MEASURED, source, tmp_path / "one", tmp_path / "large", tmp_path / "two")
    assert measured.returncode == 0, measured.stderr
    stored, grown = map(int, measured.stdout.split())
    assert stored == 4 * 12 * 3 * 1024 * 512 * 4
    assert grown <= 64 * MIB
