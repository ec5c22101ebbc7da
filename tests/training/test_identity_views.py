"""Training with spilling is bit-identical whatever views of a storage autograd saves, of whatever type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


class OfHidden(nn.Module):
    """A function of an intermediate of 64 x 64, so that what it saves is neither parameter nor input."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function((x @ self.weight).tanh())


def chunked_qkv(h: Tensor) -> Tensor:
    q, k, v = torch.cat([h, h * 2, h.sin()], 1).chunk(3, 1)
    return (q @ k.t()).softmax(-1) @ v


def split_unevenly(h: Tensor) -> Tensor:
    a, b, c = h.split([8, 24, 32], 1)
    return a.sin().sum() + b.exp().sum() + (c * c).sum()


def rows_of_equal_shape(h: Tensor) -> Tensor:
    return torch.stack([row.sin() * row for row in h.unbind(0)[::7]])


def overlapping_slices(h: Tensor) -> Tensor:
    return h[:40].sin() * h[24:].cos()


def stepped_slices(h: Tensor) -> Tensor:
    return h[::3, 1::2].exp() * h[::3, ::2].sin()


def square_transposes(h: Tensor) -> Tensor:
    return (h.t() * h).exp() * h.t().sin() * h.sin()


def expanded(h: Tensor) -> Tensor:
    return h[:, :1].expand(64, 64) * h.exp() * h[0].expand(16, 64, 64).sin().sum(0)


def strided_by_hand(h: Tensor) -> Tensor:
    return h.as_strided((31, 30), (64, 2), 3).exp() * h.as_strided((31, 30), (1, 64), 7).sin()


def unfolded(h: Tensor) -> Tensor:
    return h.unfold(1, 9, 5).exp().sum(-1) * h.unfold(0, 9, 5).sin().sum(-1).t()


def diagonals(h: Tensor) -> Tensor:
    return h.diagonal().exp() * h.diagonal(1).sin().sum() * h.flip(1).diagonal().cos()


def permuted(h: Tensor) -> Tensor:
    cube = h.view(4, 16, 64).permute(2, 0, 1)
    return cube.exp() * cube.contiguous().sin()


def squeezed(h: Tensor) -> Tensor:
    return (h.unsqueeze(0).exp() * h.unsqueeze(-1).squeeze(-1).sin()).squeeze(0).flatten().cos()


def gathered_view_and_copy(h: Tensor) -> Tensor:
    return h.narrow(0, 5, 20).exp() * h[5:25].clone().sin() * h[torch.arange(5, 25)].cos()


def moved_and_swapped(h: Tensor) -> Tensor:
    return h.view(4, 16, 64).movedim(0, 2).exp() * h.view(64, 16, 4).swapaxes(0, 2).sin().mT.reshape(
        16, 64, 4
    )


def conjugated(h: Tensor) -> Tensor:
    z = torch.complex(h, h.t().sin())
    return z.conj() * z.exp() * z.conj().t().sin()


def imaginary_of_conjugate(h: Tensor) -> Tensor:
    z = torch.complex(h, h.cos()) * 1
    negated = z.conj().imag  # has the lazy negative bit
    return negated * negated.exp() * z.real.sin() * z.imag


def real_views_of_complex(h: Tensor) -> Tensor:
    z = torch.complex(h, h.exp()) * 2
    return torch.view_as_real(z).sin() * torch.view_as_real(z * z).cos()


def complex_view_of_real(h: Tensor) -> Tensor:
    z = torch.view_as_complex((h * 2).view(64, 32, 2))
    return z.exp() * z.conj()


def spectrum(h: Tensor) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(h).exp() * torch.fft.fft(h.t()).conj()).abs()


def boolean_masks(h: Tensor) -> Tensor:
    mask = h > 0
    return torch.where(mask, h.exp(), h.sin()) * h.masked_fill(~mask, 0.5).cos() * h.relu()


def masked_select(h: Tensor) -> Tensor:
    return h[h > 0.1].exp().sum() * h.masked_select(h < 0).sin().sum()


def integer_indices(h: Tensor) -> Tensor:
    rows = torch.randint(0, 64, (512,))
    picked = h.index_select(0, rows[:128]) * h[rows[128:256], :].exp()
    return picked.sin() * h.gather(0, rows.view(8, 64)).cos().sum()


def scattered(h: Tensor) -> Tensor:
    index = torch.randint(0, 64, (64, 64))
    return h.scatter_add(0, index, h.exp()).sin() * h.index_add(1, torch.arange(64), h.t()).cos()


def put_by_index(h: Tensor) -> Tensor:
    out = h * 1
    out[torch.arange(0, 64, 2)] = h[1::2].exp()
    return out.sin() * out


def extremes(h: Tensor) -> Tensor:
    values, _ = h.topk(9, 1)
    return (
        values.exp()
        * h.sort(0).values[:, :9].sin()
        * h.max(1, keepdim=True).values
        * h.cummax(0).values[:, :9]
    )


def empty_tensors(h: Tensor) -> Tensor:
    nothing = h[:0].exp() * h[:0]
    return torch.cat([nothing, h.exp() * h, h[:, :0].sin().sum(1, keepdim=True).expand(64, 64)])


def scalars(h: Tensor) -> Tensor:
    return h.norm() * h.sum().exp().sin() * h.mean() * h.exp()


def half_precision(h: Tensor) -> Tensor:
    return (h.bfloat16().exp() * h.bfloat16().t()).float() * h.half().sin().float() * h.double().exp().float()


def views_of_other_types(h: Tensor) -> Tensor:
    signs = (h * 2).detach().view(torch.int32) >> 31
    return h.exp() * signs.float() * (h * 3).detach().view(torch.uint8).float().view(64, 64, 4).sum(-1)


def one_storage_many_views(h: Tensor) -> Tensor:
    base = h.exp()
    for i in range(8):
        base = base + base.roll(i, 0)[i : i + 1] * base[:, i : i + 1]
    return base.log()


def einsum(h: Tensor) -> Tensor:
    return torch.einsum("ij,kj,kl->il", h, h.exp(), h.t().sin())


def batched_products(h: Tensor) -> Tensor:
    a = h.view(4, 16, 64)
    return torch.baddbmm(a @ a.mT, a, a.exp().mT).sin() @ a


def factorised(h: Tensor) -> Tensor:
    square = h @ h.t() + 64 * torch.eye(64)
    return torch.linalg.cholesky(square) + torch.linalg.solve(square, h) + torch.linalg.inv(square)


def sorted_out_of_order(h: Tensor) -> Tensor:
    """Saves early what is used last, and the same storage at several times."""
    early = h.exp()
    middle = (h.sin() * early).cos() * h
    return middle * early + (early.t() * middle).tanh()


def accumulated(h: Tensor) -> Tensor:
    return h.cumsum(0).sin() * (h.abs() + 1).cumprod(1).log() * h.logcumsumexp(0)


def padded(h: Tensor) -> Tensor:
    image = h.view(1, 1, 64, 64)
    return F.pad(image, (3, 2, 1, 4), mode="reflect").exp() * F.pad(image, (3, 2, 1, 4)).cos()


FUNCTIONS: list[Function] = [
    value
    for value in list(globals().values())
    if getattr(value, "__annotations__", {}) == {"h": Tensor, "return": Tensor}
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_nothing_differs(bench: Any, function: Function) -> None:
    bench.check(lambda: OfHidden(function))
