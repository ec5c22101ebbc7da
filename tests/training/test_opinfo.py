"""Every differentiable operator that PyTorch tests itself with has the same gradient, bit for bit, with spilling.

The operators and their inputs are PyTorch's own database. Each is run on intermediates that nobody else keeps, so that
what it saves must be read back; and on leaves, whose gradients must not share bytes with them where plain ones do not.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from undercroft import ActivationSpill

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about what its own samples do

CASES = [
    pytest.param(op, dtype, id=f"{op.formatted_name}-{str(dtype)[6:]}")
    for op in op_db
    for dtype in (torch.float32, torch.complex64)
    if op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
]
# It saves what it fills only afterwards, and so cannot be spilled: see test_identity_modules.
FILLS_WHAT_IT_SAVED = {"nn_functional_rrelu"}
# The backward of one of their samples needs more in memory at once than the budget of the others.
NEED_ROOM = {"nn_functional_conv_transpose3d", "grid_sampler_3d"}


@dataclass(frozen=True)
class Gradients:
    """Of one sample: the gradients of its leaves, and which of them share bytes with a leaf."""

    values: list[Tensor | None]
    shared: list[bool]

    def same_as(self, other: "Gradients") -> bool:
        pairs = zip(self.values, other.values, strict=True)
        return self.shared == other.shared and all(_same(one, two) for one, two in pairs)


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    if one.layout is not torch.strided:
        return one.layout == two.layout and torch.equal(one.to_dense(), two.to_dense())
    same_form = (one.dtype, one.shape, one.stride()) == (two.dtype, two.shape, two.stride())
    return same_form and torch.equal(_bits(one), _bits(two))


def _bits(tensor: Tensor) -> Tensor:
    # `contiguous` would keep the odd stride of a lone element.
    packed = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return packed.flatten().view(torch.uint8)


def gradients_of(op: Any, sample: Any, ballast: Tensor, *, of_copies: bool) -> Gradients:
    torch.manual_seed(0)
    values = (sample.input, sample.args, sample.kwargs)
    leaves = [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    loss = _loss(op, sample, values, of_copies=of_copies)
    # What was saved before is wanted last, and so written first.
    _pushed_out = [ballast.exp() for _ in range(6)]
    loss.backward()
    taken = {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.layout is torch.strided}
    gradients = [leaf.grad for leaf in leaves]
    shared = [
        gradient is not None
        and gradient.layout is torch.strided
        and gradient.untyped_storage().data_ptr() in taken
        for gradient in gradients
    ]
    return Gradients(gradients, shared)


def _loss(op: Any, sample: Any, values: tuple[Any, Any, Any], *, of_copies: bool) -> Tensor:
    """A loss that holds neither inputs nor outputs of the operator but through what was saved."""

    def copied(value: object) -> object:
        is_leaf = of_copies and isinstance(value, Tensor) and value.requires_grad
        return value.clone() if is_leaf else value

    given, args, kwargs = tree_map(copied, values)
    output = sample.output_process_fn_grad(op(given, *args, **kwargs))
    terms = [
        _scalar(value)
        for value in tree_flatten(output)[0]
        if isinstance(value, Tensor) and value.requires_grad
    ]
    return torch.stack(terms).sum()


def _scalar(value: Tensor) -> Tensor:
    dense = value.to_dense() if value.layout is not torch.strided else value
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    weights = torch.linspace(0.5, 1.5, max(real.numel(), 1))[: real.numel()].view(real.shape)
    return (real.float() * weights).sum()


class Spilling:
    """One spill for many operators, always in its first step, so that it plans nothing. It has a thread of its own."""

    def __init__(self, budget: str, directory: Path) -> None:
        self.spill = ActivationSpill(budget=budget, directory=directory, min_bytes=1)
        self._plain, self._spilling = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # hooks are a thread's own
        self._ballast = torch.ones(self.spill.budget // 4 * 2 // 9, requires_grad=True)
        self._spilling.submit(self.spill.__enter__).result()
        self._keeps_the_step_open = self._spilling.submit(self._ballast.exp).result()

    def plain(self, op: Any, sample: Any, *, of_copies: bool) -> Gradients | None:
        """Without spilling; None where the operator fails, or does not repeat itself."""
        run: Callable[[], Gradients] = lambda: gradients_of(op, sample, self._ballast, of_copies=of_copies)  # noqa: E731
        try:
            one, two = (self._plain.submit(run).result() for _ in range(2))
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None
        return one if one.same_as(two) else None

    def spilled(self, op: Any, sample: Any, *, of_copies: bool) -> Gradients:
        return self._spilling.submit(gradients_of, op, sample, self._ballast, of_copies=of_copies).result()

    def close(self) -> None:
        self._spilling.submit(self.spill.__exit__, None, None, None).result()
        self.spill.close()
        self._plain.shutdown()
        self._spilling.shutdown()


@pytest.fixture(scope="module")
def spilling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spilling]:
    with closing(Spilling("288KiB", tmp_path_factory.mktemp("spill"))) as made:
        yield made


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spilling]:
    with closing(Spilling("24MiB", tmp_path_factory.mktemp("spill"))) as made:
        yield made


def check(op: Any, dtype: torch.dtype, spilling: Spilling, *, most: int | None) -> None:
    if op.formatted_name in FILLS_WHAT_IT_SAVED:
        pytest.skip("refused: it saves what it fills afterwards")
    compared = 0
    for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), most):
        for of_copies in (True, False):
            plain = spilling.plain(op, sample, of_copies=of_copies)
            if plain is not None:
                assert spilling.spilled(op, sample, of_copies=of_copies).same_as(plain), sample
                compared += 1
    if not compared:
        pytest.skip("no sample has a gradient that plain autograd repeats")


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_gradients_of_an_operator(op: Any, dtype: torch.dtype, spilling: Spilling) -> None:
    check(op, dtype, spilling, most=1)


def test_what_these_tests_save_is_really_read_back(spilling: Spilling) -> None:
    before = spilling.spill.report
    for op in (op for op in op_db if op.name in ("exp", "mul", "softmax")):
        check(op, torch.float32, spilling, most=1)
    after = spilling.spill.report
    assert after.spilled_nbytes > before.spilled_nbytes
    assert after.read_nbytes > before.read_nbytes


@pytest.mark.slow
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_gradients_of_an_operator_for_all_its_samples(
    op: Any, dtype: torch.dtype, spilling: Spilling, roomy: Spilling
) -> None:
    check(op, dtype, roomy if op.formatted_name in NEED_ROOM else spilling, most=None)
