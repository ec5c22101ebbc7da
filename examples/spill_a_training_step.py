"""A training loop of your own, with its activations on disk: one context, and the same numbers."""

import torch
from torch import nn

import undercroft as uc


def train(model: nn.Module, spill: uc.ActivationSpill | None, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    losses: list[float] = []
    for _ in range(steps):
        if spill is None:
            loss = model(inputs).square().mean()
            loss.backward()
        else:
            with spill:
                loss = model(inputs).square().mean()
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(512, 512), nn.GELU())))


def main() -> None:
    plain = train(deep_model(), None)
    model = deep_model()
    spill = uc.ActivationSpill(model, budget="4MiB", min_bytes="64KiB")
    spilled = train(model, spill)
    print(spill.report)
    print("losses are the same, bit for bit:", plain == spilled)
    assert plain == spilled
    spill.close()


if __name__ == "__main__":
    main()
