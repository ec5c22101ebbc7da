"""Training with spilling is bit-identical for the modules of torch, for mixed precision and for adapters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undercroft import UnsupportedModel

Build = Callable[[], nn.Module]


class Applied(nn.Module):
    """Modules, and how they are applied to a float input of 64 x 64."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_children()))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.SiLU(), nn.RMSNorm(64)
    )


def dropouts() -> nn.Module:
    hidden = nn.Sequential(
        nn.Linear(64, 96), nn.Dropout(0.3), nn.ReLU(), nn.AlphaDropout(0.2), nn.Linear(96, 64)
    )
    return nn.Sequential(hidden, nn.FeatureAlphaDropout(0.1))


def in_place_activations() -> nn.Module:
    first = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.SELU(inplace=True))
    return nn.Sequential(first, nn.Linear(64, 64), nn.Dropout(0.5, inplace=True), nn.LeakyReLU(inplace=True))


class Attention(nn.Module):
    def __init__(
        self, *, causal: bool = False, masked: bool = False, groups: int = 1, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 128 // groups), nn.Linear(64, 64)
        self.causal, self.masked, self.grouped, self.drop = causal, masked, groups > 1, drop

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        q, k, v = (each.view(2, 32, -1, 8).transpose(1, 2) for each in (q, k, v))
        mask = torch.randn(2, 1, 32, 32) if self.masked else None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.drop, is_causal=self.causal, enable_gqa=self.grouped
        )
        return self.out(out.transpose(1, 2).reshape(64, 64))


class LearnedMask(Attention):
    """An attention whose mask gets a gradient, which the fused kernels refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, self.bias))


def attention_causal() -> nn.Module:
    return Attention(causal=True)


def attention_masked() -> nn.Module:
    return Attention(masked=True)


def attention_grouped() -> nn.Module:
    return Attention(causal=True, groups=4)


def attention_dropout() -> nn.Module:
    return Attention(drop=0.2)


def attention_of_torch() -> nn.Module:
    return Applied(lambda x, a: a(x, x, x)[0], a=nn.MultiheadAttention(64, 4, dropout=0.1))


def recurrent(kind: type[nn.Module]) -> Build:
    def build() -> nn.Module:
        network = kind(64, 24, bidirectional=True)
        return Applied(lambda x, network: network(x.view(4, 16, 64))[0], network=network)

    build.__name__ = kind.__name__
    return build


def packed_sequence() -> nn.Module:
    def apply(x: Tensor, network: nn.Module) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x.view(4, 16, 64), torch.arange(16, 0, -1).clamp(max=4))
        return nn.utils.rnn.pad_packed_sequence(network(packed)[0])[0]

    return Applied(apply, network=nn.GRU(64, 24))


def convolution_1d() -> nn.Module:
    layers = nn.Sequential(nn.Conv1d(16, 24, 3, padding=1), nn.GELU(), nn.Conv1d(24, 16, 3, dilation=2))
    return Applied(lambda x, layers: layers(x.view(4, 16, 64)), layers=layers)


def convolution_2d() -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2, return_indices=False),
        nn.Conv2d(8, 8, 3, groups=4),
    )
    return Applied(lambda x, layers: layers(x.view(1, 4, 32, 32)), layers=layers)


def convolution_channels_last() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)).to(
        memory_format=torch.channels_last
    )
    return Applied(
        lambda x, layers: layers(x.view(1, 4, 32, 32).contiguous(memory_format=torch.channels_last)),
        layers=layers,
    )


def convolution_transposed() -> nn.Module:
    layers = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2), nn.Softplus(), nn.ConvTranspose2d(8, 2, 2))
    return Applied(lambda x, layers: layers(x.view(4, 4, 16, 16)), layers=layers)


def pooling() -> nn.Module:
    layers = nn.Sequential(
        nn.AvgPool2d(2),
        nn.AdaptiveMaxPool2d(9),
        nn.LPPool2d(2, 2),
        nn.Upsample(scale_factor=2.5, mode="bilinear"),
    )
    return Applied(lambda x, layers: layers(x.exp().view(4, 4, 16, 16)), layers=layers)


def norms_of_batches() -> nn.Module:
    layers = nn.Sequential(
        nn.BatchNorm1d(64), nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=None), nn.Tanh()
    )
    return nn.Sequential(layers, nn.Linear(64, 64), nn.BatchNorm1d(64, track_running_stats=False))


def norms_of_groups() -> nn.Module:
    layers = nn.Sequential(
        nn.GroupNorm(4, 16), nn.Conv1d(16, 16, 3), nn.InstanceNorm1d(16, affine=True), nn.LocalResponseNorm(3)
    )
    return Applied(lambda x, layers: layers(x.view(4, 16, 64)), layers=layers)


def reparametrised() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    return nn.Sequential(normed, nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)))


def _tokens(x: Tensor, vocabulary: int = 50) -> Tensor:
    return (x.detach().abs() * 1000).long() % vocabulary


def embedding() -> nn.Module:
    return Applied(
        lambda x, table: table(_tokens(x)).sum(1).exp() * x, table=nn.Embedding(50, 64, padding_idx=3)
    )


def embedding_sparse() -> nn.Module:
    return Applied(
        lambda x, table: table(_tokens(x)).sum(1).sin() * x.exp(), table=nn.Embedding(50, 64, sparse=True)
    )


def embedding_scaled_by_frequency() -> nn.Module:
    table = nn.Embedding(50, 64, max_norm=1.0, scale_grad_by_freq=True)
    return Applied(lambda x, table: table(_tokens(x)).mean(1).sin() * x.exp(), table=table)


def embedding_bags() -> nn.Module:
    def apply(x: Tensor, **bags: nn.Module) -> Tensor:
        return torch.stack([bag(_tokens(x)) for bag in bags.values()]).sin() * x.exp()

    return Applied(apply, sum=nn.EmbeddingBag(50, 64, mode="sum"), max=nn.EmbeddingBag(50, 64, mode="max"))


def tied_weights() -> nn.Module:
    def apply(x: Tensor, table: nn.Module, head: nn.Module) -> Tensor:
        tokens = _tokens(x)[:, 0]
        return F.cross_entropy(head(table(tokens) + x), tokens)

    table, head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
    head.weight = table.weight
    return Applied(apply, table=table, head=head)


def shared_layers() -> nn.Module:
    layer = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(layer, layer, layer)


def frozen_parameters() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model[2].requires_grad_(False)
    model[0].weight.requires_grad_(False)
    return model


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.frozen(x) + 2.0 * self.up(F.dropout(self.down(x), 0.1))).sin()


def adapters_by_hand() -> nn.Module:
    return nn.Sequential(Adapted(), Adapted(), Adapted())


def adapters_of_peft() -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh())
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["0", "2"], init_lora_weights=False)
    return inject_adapter_in_model(config, model)


def autocast() -> nn.Module:
    def apply(x: Tensor, layers: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layers(x) + layers(x).softmax(-1)

    return Applied(
        apply, layers=nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
    )


def brain_floats() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).bfloat16()
    return Applied(lambda x, model: model(x.bfloat16()), model=model)


def losses() -> nn.Module:
    def apply(x: Tensor, layer: nn.Module) -> Tensor:
        out, target, labels = layer(x), x.detach().flip(0), _tokens(x, 64)[:, 0]
        ones = torch.ones(64)
        return (
            F.cross_entropy(out, labels, label_smoothing=0.1)
            + F.cross_entropy(out, target.softmax(-1))
            + F.smooth_l1_loss(out, target)
            + F.kl_div(out.log_softmax(-1), target.softmax(-1), reduction="batchmean")
            + F.binary_cross_entropy_with_logits(out, target.sigmoid())
            + F.cosine_embedding_loss(out, target, ones)
            + F.triplet_margin_loss(out, target, x)
            + F.multi_margin_loss(out, labels)
        )

    return Applied(apply, layer=nn.Linear(64, 64))


def connectionist_temporal_loss() -> nn.Module:
    def apply(x: Tensor, layer: nn.Module) -> Tensor:
        frames = layer(x).view(16, 4, 64).log_softmax(-1)
        targets = torch.randint(1, 64, (4, 5))
        return F.ctc_loss(frames, targets, torch.full((4,), 16), torch.full((4,), 5))

    return Applied(apply, layer=nn.Linear(64, 64))


def experts() -> nn.Module:
    """A mixture of experts that routes rows by index."""

    def apply(x: Tensor, gate: nn.Module, **experts: nn.Module) -> Tensor:
        scores, chosen = gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(experts.values()):
            rows, place = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(x[rows]) * scores[rows, place, None])
        return out

    blocks = {f"expert{i}": nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 64)) for i in range(4)}
    return Applied(apply, gate=nn.Linear(64, 4), **blocks)


def transformer() -> nn.Module:
    model = nn.Transformer(32, 2, 1, 1, 64, batch_first=True)
    return Applied(lambda x, model: model(x.view(4, 32, 32), x.view(4, 32, 32).flip(1)), model=model)


BUILDS: list[Build] = [
    perceptron,
    dropouts,
    in_place_activations,
    attention_causal,
    attention_masked,
    attention_grouped,
    attention_dropout,
    LearnedMask,
    attention_of_torch,
    recurrent(nn.RNN),
    recurrent(nn.LSTM),
    recurrent(nn.GRU),
    packed_sequence,
    convolution_1d,
    convolution_2d,
    convolution_channels_last,
    convolution_transposed,
    pooling,
    norms_of_batches,
    norms_of_groups,
    reparametrised,
    embedding,
    embedding_sparse,
    embedding_scaled_by_frequency,
    embedding_bags,
    tied_weights,
    shared_layers,
    frozen_parameters,
    adapters_by_hand,
    adapters_of_peft,
    autocast,
    brain_floats,
    losses,
    connectionist_temporal_loss,
    experts,
    transformer,
]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_nothing_differs(bench: Any, build: Build) -> None:
    bench.check(build)


def test_rrelu_is_never_silently_wrong(bench: Any) -> None:
    """It saves its noise before it fills it, and tells nobody: spilled too early, the noise would be lost."""
    with pytest.raises(UnsupportedModel, match="rrelu"):
        bench.check(lambda: nn.Sequential(nn.Linear(64, 64), nn.RReLU(), nn.Linear(64, 64), nn.RReLU()))
