"""A packed folder read back: what records give is what the model has, and what was changed is never believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from tests.moe.conftest import prompt, stock
from tests.moe.families import decorated, fill, tiny_config

from undercroft import kernels
from undercroft.errors import CorruptRecord, InvalidInput, WrongVersion
from undercroft.models.checkpoint import Checkpoint
from undercroft.models.source import read_config
from undercroft.models.tracing import Lazy, load
from undercroft.moe.pack import pack
from undercroft.moe.packed import NOWHERE, PackedExperts, PackedMatrix, is_packed, open_packed
from undercroft.store.cache import RecordCache
from undercroft.store.record import Key
from undercroft.store.slab import Lease, Slab
from undercroft.store.transfer import TransferQueue
from undercroft.units import MIB

FAMILIES = {
    each[0].model_type: each
    for each in decorated()
    if each[0].model_type in {"qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h"}
}
TRANSPOSED = {"gpt_oss"}


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A small model, packed exactly and in int4."""
    pack(checkpoint(), tmp_path / "packed")
    return tmp_path / "packed"


def leased(nbytes: int) -> Lease:
    lease = Slab(nbytes).lease(nbytes)
    assert lease is not None
    return lease


def read(experts: PackedExperts, key: Key, layer: int) -> dict[str, torch.Tensor | PackedMatrix]:
    lease = leased(experts.files[layer][key].occupied)
    experts.files[layer].read(key, lease)
    return experts.parameters(key, lease)


def wanted(model: Any, experts: PackedExperts, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """What stock transformers has of an expert."""
    module = model.get_submodule(experts.layers[layer].module)
    return {name: stacked[expert] for name, stacked in module.named_parameters(recurse=False)}


@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_holds_what_the_model_has(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, family = FAMILIES[name]
    model = family(tiny_config(config))
    fill(model, seed=0)
    model.to(dtype).save_pretrained(tmp_path / "model")
    whole = stock(tmp_path / "model", dtype)
    for high, low in (("keep", "int4"), ("lossless", "int4"), ("bf16", "int2"), ("int8", "none")):
        out = tmp_path / f"{high}-{low}"
        pack(tmp_path / "model", out, high=high, low=low)
        with open_packed(out) as experts:
            check_all(experts, whole, name in TRANSPOSED)


def check_all(experts: PackedExperts, model: Any, transposed: bool) -> None:
    for layer in experts.layers:
        for expert in range(layer.experts):
            expected = wanted(model, experts, layer.number, expert)
            for kind in filter(None, (experts.high, experts.low)):
                found = read(experts, layer.key(expert, kind), layer.number)
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    check(kind, found[name], tensor, transposed)


def check(kind: str, found: torch.Tensor | PackedMatrix, expected: torch.Tensor, transposed: bool) -> None:
    if kind.startswith("int") and expected.dim() == 2:
        assert isinstance(found, PackedMatrix)
        matrix = expected.t() if transposed else expected
        assert (found.rows, found.columns, found.transposed) == (*matrix.shape, transposed)
        assert found.format == kernels.Format.parse(kind)
        assert torch.equal(found.packed, kernels.quantise(matrix, found.format))
        assert torch.nn.functional.mse_loss(found.tensor(), expected.float()) < 0.02**2
        return
    assert isinstance(found, torch.Tensor)
    exact = expected.bfloat16() if kind == "bfloat16" else expected
    assert found.dtype == exact.dtype
    assert torch.equal(found, exact)


@pytest.mark.filterwarnings("ignore")
def test_the_families_are_those_meant(tmp_path: Path) -> None:
    assert len(FAMILIES) == 5
    config, family = FAMILIES["gpt_oss"]
    family(tiny_config(config)).save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "out")
    with open_packed(tmp_path / "out") as experts:
        assert set(experts.layers[0].parameters) == {
            *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        }


def test_a_packed_matrix_multiplies_as_it_lies(packed: Path) -> None:
    with open_packed(packed) as experts:
        matrix = read(experts, experts.layers[0].key(3, "int4"), 0)["gate_up_proj"]
        assert isinstance(matrix, PackedMatrix)
        x = torch.randn(5, matrix.columns)
        found = kernels.linear(x, matrix.packed, matrix.format, matrix.rows)
        torch.testing.assert_close(found, x @ matrix.tensor().t(), rtol=0.05, atol=0.05)


def test_a_cache_serves_the_records(packed: Path) -> None:
    slab = Slab(MIB)
    with open_packed(packed) as experts, TransferQueue() as queue:
        keys = [layer.key(15, kind) for layer in experts.layers for kind in ("keep", "int4")]
        with RecordCache(experts.files, MIB, slab, queue) as cache:
            for key, lease in cache.fetch(keys):
                found, plain = experts.parameters(key, lease), read(experts, key, int(key.name.split(".")[1]))
                del lease
                assert all(equal(found[name], plain[name]) for name in plain)
                del found
    slab.close()


def equal(one: torch.Tensor | PackedMatrix, other: torch.Tensor | PackedMatrix) -> bool:
    pair = [each.packed if isinstance(each, PackedMatrix) else each for each in (one, other)]
    return torch.equal(*pair)


def test_the_stock_knows_sizes(packed: Path) -> None:
    with open_packed(packed) as experts:
        found = experts.stock(used=4)
        for key in found.places:
            assert found.occupied(key) == experts.files[found.places[key].layer][key].occupied
        assert (found.experts, found.layers, found.high, found.low) == (16, 3, "keep", "int4")


def test_a_loader_finds_every_name_though_experts_are_gone(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint()
    pack(source, tmp_path / "out")
    whole = stock(source)
    with open_packed(tmp_path / "out") as experts, Checkpoint(tmp_path / "out") as dense:

        def give(stored: Any, dtype: torch.dtype | None) -> torch.Tensor:
            if stored.file == NOWHERE:
                return torch.empty(stored.shape, dtype=dtype, device="meta")
            return dense.read(stored)

        every = {name: Lazy(each, give) for name, each in {**dense, **experts.tensors}.items()}
        config = read_config(str(tmp_path / "out"))
        model = load(config, every, dtype=torch.float32, experts="eager")
        for layer in experts.layers:
            module = model.get_submodule(layer.module)
            for name, parameter in module.named_parameters(recurse=False):
                assert parameter.is_meta
                assert parameter.dtype == layer.parameters[name].dtype
                assert tuple(parameter.shape) == (layer.experts, *layer.parameters[name].shape)
                module.register_parameter(name, torch.nn.Parameter(stack(experts, layer.number, name)))
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt()).logits, whole(input_ids=prompt()).logits)


def stack(experts: PackedExperts, layer: int, name: str) -> torch.Tensor:
    keys = [experts.layers[layer].key(expert, experts.high) for expert in range(16)]
    return torch.stack([read(experts, key, layer)[name] for key in keys])  # pyright: ignore


def test_only_what_is_complete_is_packed(packed: Path, tmp_path: Path) -> None:
    assert is_packed(packed)
    (packed / "undercroft-pack.json").rename(packed / "undercroft-pack.json.unfinished")
    assert not is_packed(packed)
    with pytest.raises(InvalidInput, match="pack a model first"):
        open_packed(packed)
    (packed / "undercroft-pack.json.unfinished").rename(packed / "undercroft-pack.json")
    change(packed, lambda manifest: manifest.update(indexes=[]))
    with pytest.raises(CorruptRecord, match="not packed to its end"):
        open_packed(packed)


def change(folder: Path, act: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody who knows how to seal it."""
    path = folder / "undercroft-pack.json"
    content = json.loads(path.read_text())
    content.pop("xxh3_64")
    act(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "xxh3_64": xxhash.xxh3_64_hexdigest(text.encode())}))


def test_a_flipped_bit_is_noticed(packed: Path) -> None:
    with open_packed(packed) as experts:
        key = experts.layers[1].key(7, "int4")
        record = experts.files[1][key]
    with (packed / "experts-00001.records").open("r+b") as file:
        file.seek(record.offset + record.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(record.offset + record.nbytes - 1)
        file.write(bytes([byte ^ 16]))
    with open_packed(packed) as experts:
        with pytest.raises(CorruptRecord, match=r"layers\.1\.experts\.7"):
            read(experts, key, 1)
        read(experts, experts.layers[1].key(7, "keep"), 1)


def test_a_changed_dense_weight_is_noticed_unless_nobody_looks(packed: Path) -> None:
    content = bytearray((packed / "dense.safetensors").read_bytes())
    content[-1] ^= 1
    (packed / "dense.safetensors").write_bytes(content)
    with pytest.raises(CorruptRecord, match=r"dense\.safetensors was changed"):
        open_packed(packed)
    open_packed(packed, verify="never").close()


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("dense.safetensors", Path.unlink, "No such file"),
        ("experts-00001.records", Path.unlink, "No such file"),
        ("experts-00001.records", lambda path: path.write_bytes(path.read_bytes()[:-4096]), "is cut off"),
        ("experts-00001.records.json", Path.unlink, "is missing"),
        ("experts-00001.records.json", lambda path: path.write_text(path.read_text() + " "), "was changed"),
        (
            "undercroft-pack.json",
            lambda path: path.write_text(path.read_text().replace("16", "15")),
            "was changed",
        ),
        ("undercroft-pack.json", lambda path: path.write_text("{}"), "describes no packed model"),
    ],
)
def test_a_changed_folder_is_refused(packed: Path, name: str, harm: Callable[[Path], Any], told: str) -> None:
    harm(packed / name)
    with pytest.raises(Exception, match=told) as caught:
        open_packed(packed)
    assert type(caught.value).__module__ == "undercroft.errors"


def test_another_version_is_said(packed: Path) -> None:
    change(packed, lambda manifest: manifest.update(version=2))
    with pytest.raises(WrongVersion, match="has version 2; this Undercroft reads version 1"):
        open_packed(packed)


@pytest.mark.usefixtures("nothing_left")
def test_nothing_stays_open(packed: Path) -> None:
    with open_packed(packed) as experts:
        read(experts, experts.layers[0].key(0, "keep"), 0)
    (packed / "experts-00002.records.json").write_text("{}")
    with pytest.raises(CorruptRecord):
        open_packed(packed)
