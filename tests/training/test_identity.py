"""Storages are recognised, and views rebuilt, exactly."""

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from undercroft.training.identity import SavedView, StorageRef, check_version, storage_key, why_kept


def test_a_reference_keeps_nothing_alive_and_its_key_apart() -> None:
    tensor = torch.randn(1000)
    ref = StorageRef(tensor.untyped_storage())
    assert ref.key == storage_key(tensor) == storage_key(tensor[3:].view(-1))
    assert ref.alive().data_ptr() == tensor.data_ptr()
    del tensor
    gc.collect()
    assert ref.alive() is None
    others = [torch.randn(1000) for _ in range(50)]
    assert ref.key not in {storage_key(other) for other in others}


def test_a_storage_revived_is_the_same() -> None:
    tensor = torch.randn(10)
    ref = StorageRef(tensor.untyped_storage())
    revived = ref.alive()
    key = storage_key(tensor)
    del tensor
    assert ref.alive() is not None
    again = torch.empty(0).set_(revived, 0, (10,), (1,))
    assert storage_key(again) == key


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda z: z,
    "transposed": lambda z: z.t(),
    "offset": lambda z: z[1:, 2:],
    "stepped": lambda z: z[::2, 1::3],
    "expanded": lambda z: z[:, :1].expand(6, 9),
    "diagonal": lambda z: z.diagonal(),
    "unfolded": lambda z: z.unfold(1, 3, 2),
    "scalar": lambda z: z[2, 3],
    "empty": lambda z: z[:0],
    "conjugate": lambda z: z.conj(),
    "conjugate transposed": lambda z: z.conj().t()[1:],
    "imaginary": lambda z: z.imag,
    "negative": lambda z: z.conj().imag,
    "real pairs": lambda z: torch.view_as_real(z),
    "bytes": lambda z: torch.view_as_real(z).view(torch.uint8),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_rebuilt_over_other_bytes(name: str) -> None:
    base = torch.randn(6, 8, dtype=torch.complex64)
    view = VIEWS[name](base)
    saved = SavedView(view)
    rebuilt = saved.over(base.untyped_storage().clone())
    assert torch.equal(rebuilt, view)
    assert (rebuilt.dtype, rebuilt.stride(), rebuilt.storage_offset()) == (
        view.dtype,
        view.stride(),
        view.storage_offset(),
    )
    assert (rebuilt.is_conj(), rebuilt.is_neg()) == (view.is_conj(), view.is_neg())
    assert storage_key(rebuilt) != storage_key(view)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms())
def test_any_permutation_and_slice_is_rebuilt(shape: list[int], random: object) -> None:
    base = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).view(shape)
    order = list(range(len(shape)))
    random.shuffle(order)
    view = base.permute(order)[
        tuple(slice(random.randrange(size), None) for size in base.permute(order).shape)
    ]
    rebuilt = SavedView(view).over(base.untyped_storage().clone())
    assert torch.equal(rebuilt, view)
    assert rebuilt.stride() == view.stride()


def test_a_saved_view_keeps_no_bytes() -> None:
    tensor = torch.randn(1000)
    ref, saved = StorageRef(tensor.untyped_storage()), SavedView(tensor)
    del tensor
    assert ref.alive() is None
    saved.check()


EDITS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda t: t.add_(1),
    "a view": lambda t: t[0].zero_(),
    "detached": lambda t: t.detach().mul_(2),
    "a resize": lambda t: t.resize_(2, 2),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed(name: str) -> None:
    tensor = torch.randn(4, 4)
    saved = SavedView(tensor)
    EDITS[name](tensor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.check()


def test_an_edit_of_a_copy_is_none() -> None:
    tensor = torch.randn(4)
    saved = SavedView(tensor)
    tensor.clone().add_(1)
    tensor.data.add_(0)  # a counter of its own: plain autograd does not notice either
    saved.check()


def test_a_rebuilt_view_shares_the_counter() -> None:
    tensor = torch.randn(4)
    saved = SavedView(tensor)
    saved.over(tensor.untyped_storage().clone()).add_(1)
    with pytest.raises(RuntimeError):
        saved.check()
    with pytest.raises(RuntimeError):
        check_version(tensor, 0)


def test_equal_versions_of_different_counters_are_told_apart() -> None:
    one, two = torch.randn(6).unsafe_chunk(2)
    assert SavedView(one).is_same_version_as(SavedView(one))
    assert SavedView(one).is_same_version_as(SavedView(one[1:]))
    assert not SavedView(one).is_same_version_as(SavedView(two))
    assert not SavedView(one).is_same_version_as(SavedView(one.data))
    assert (one._version, two._version) == (0, 0), "asking leaves no trace"
    before = SavedView(one)
    one.add_(1)
    assert not before.is_same_version_as(SavedView(one))


class Marked(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_what_can_only_be_kept() -> None:
    dense = torch.eye(3)
    assert why_kept(dense) is None
    assert why_kept(torch.nn.Parameter(dense)) is None
    with torch.inference_mode():
        made_in_inference = torch.ones(2)
    kept = {
        "subclass": dense.as_subclass(Marked),
        "sparse": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "mkldnn": dense.to_mkldnn(),
        "meta": torch.empty(2, device="meta"),
        "inference": made_in_inference,
        "zeros": torch._efficientzerotensor(2),
    }
    assert not [name for name, tensor in kept.items() if why_kept(tensor) is None]


def test_inside_vmap_is_kept() -> None:
    seen: list[str | None] = []

    def look(row: Tensor) -> Tensor:
        seen.append(why_kept(row))
        return row

    torch.func.vmap(look)(torch.eye(3))
    assert seen == ["inside vmap or grad"]
