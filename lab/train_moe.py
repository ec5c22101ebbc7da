"""Trains the bundled Mixture-of-Experts model: a Qwen3-MoE of 9.4 M parameters, on two CPU cores.

    python lab/moe_corpus.py CORPUS          # once
    python lab/train_moe.py CORPUS RUN       # trains, or goes on where RUN's checkpoint stands

RUN gets checkpoint.pt (every few hundred steps) and training.json (recipe, corpus, curve). Everything follows from
the step number and the seed, nothing from a clock: a run that was stopped and resumed does the same steps as one
that was not. How fast they are done changes nothing; the number of threads may change the last bits.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from undercroft.bundled.skills import exercises

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the weights, beside the corpus.

    Attributes:
        steps: optimiser steps in all.
        tokens: of one step.
        windows: tokens of one row before and after `widen`.
        widen: share of the steps after which rows get longer and the learning rate falls to zero.
        skills: share of the rows that hold exercises.
        rate: the highest learning rate, after `warmup` steps.
        balance: weight of the load-balancing loss, taken layer by layer.
    """

    steps: int = 3200
    tokens: int = 2048
    windows: tuple[int, int] = (256, 512)
    widen: float = 0.7
    skills: float = 0.25
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    balance: float = 0.02
    seed: int = 1

    def rate_at(self, step: int) -> float:
        """Up in `warmup` steps, flat, then down in a straight line."""
        falling = (self.steps - step) / (self.steps * (1 - self.widen))
        return self.rate * min(1.0, (step + 1) / self.warmup, falling)

    def window_at(self, step: int) -> int:
        """Tokens of one row."""
        return self.windows[step >= self.widen * self.steps]


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """The untrained model, float32."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # batched_mm copies every weight per token
    return model


class Batches:
    """The rows of each step, a pure function of its number."""

    def __init__(self, corpus: Path, recipe: Recipe) -> None:
        arrays = np.load(corpus / "corpus.npz")
        self.text = np.concatenate([arrays[name] for name in arrays if name.startswith("train_")])
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(corpus / "tokenizer")
        self.recipe = recipe

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, both (rows, window) int64; labels of questions are ignored."""
        window = self.recipe.window_at(step)
        rows = self.recipe.tokens // window
        drilled = max(1, round(rows * self.recipe.skills))
        starts = np.random.default_rng([self.recipe.seed, step]).integers(
            0, len(self.text) - window, rows - drilled
        )
        text = torch.from_numpy(np.stack([self.text[n : n + window] for n in starts]).astype(np.int64))
        drill = self._drill(drilled * window, Random(f"{self.recipe.seed} {step}")).view(2, drilled, window)
        return torch.cat([text, drill[0]]), torch.cat([text, drill[1]])

    def _drill(self, length: int, dice: Random) -> Tensor:
        end = self.tokenizer.eos_token_id
        tokens, labels = [end], [IGNORED]
        for each in exercises("train", dice):
            question = self._numbers(f"Question: {each.question}\nAnswer:")
            solution = [*self._numbers(f" {each.solution}"), end]
            tokens += question + solution
            labels += [IGNORED] * len(question) + solution
            if len(tokens) >= length:
                break
        return torch.tensor([tokens[:length], labels[:length]])

    def _numbers(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Balance:
    """The load-balancing loss of Switch Transformers (2101.03961, formula 4), the mean over the layers' own losses.

    Pooled over layers, as transformers has it, the loss looks ideal while one layer's dead experts hide behind
    another's favourites. 1.0 is perfect balance.
    """

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self._losses: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record)

    def collect(self) -> Tensor:
        """The loss of the forward pass that just ended."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        return loss

    def _record(self, gate: nn.Module, _: Any, routed: tuple[Tensor, Tensor, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        logits, _, chosen = routed
        experts = logits.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        self._losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())


def loss_of(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats, over labels that are not ignored."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def held_out_windows(corpus: Path, length: int, per_domain: int = 10) -> dict[str, Tensor]:
    """By domain, windows (per_domain, length) int64, spread evenly over its test documents."""
    arrays = np.load(corpus / "corpus.npz")
    windows: dict[str, Tensor] = {}
    for name in arrays:
        side, _, domain = name.partition("_")
        if side == "test":
            text = arrays[name].astype(np.int64)
            starts = np.linspace(0, len(text) - length, per_domain).astype(int)
            windows[domain] = torch.from_numpy(np.stack([text[n : n + length] for n in starts]))
    return windows


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean nats per token over windows (rows, length)."""
    model.eval()
    losses = [loss_of(model, rows, rows).item() for rows in windows.split(5)]
    model.train()
    return sum(losses) / len(losses)


class Training:
    """A run, resumable at its checkpoints.

    Args:
        corpus: what `moe_corpus.py` wrote.
        run: where checkpoint and curve go.
        recipe: of the run; a checkpoint of another recipe is refused.
    """

    def __init__(self, corpus: Path, run: Path, recipe: Recipe) -> None:
        self.recipe, self.run = recipe, run
        self.batches = Batches(corpus, recipe)
        self.model = new_model(self.batches.tokenizer, recipe.seed)
        self.balance = Balance(self.model)
        self.optimiser = torch.optim.AdamW(self._groups(), lr=recipe.rate, betas=(0.9, 0.95), fused=True)
        self.corpus = json.loads((corpus / "corpus.json").read_text())
        self.windows = torch.cat(list(held_out_windows(corpus, recipe.windows[0]).values()))
        self.step, self.curve = 0, list[dict[str, float]]()
        run.mkdir(parents=True, exist_ok=True)
        if (run / "checkpoint.pt").exists():
            self._resume()

    def steps(self) -> Iterator[dict[str, float]]:
        """One optimiser step after the other; gives what was measured in each."""
        while self.step < self.recipe.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.rate_at(self.step)
            loss = loss_of(self.model, *self.batches.at(self.step))
            balance = self.balance.collect()
            (loss + self.recipe.balance * balance).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            yield {"loss": loss.item(), "balance": balance.item()}

    def train(self, *, every: int = 50, test_every: int = 200) -> None:
        """Go to the end; a point of the curve `every` so many steps, test loss and checkpoint every `test_every`."""
        measured: list[dict[str, float]] = []
        for one in self.steps():
            measured.append(one)
            if self.step % every == 0 or self.step == self.recipe.steps:
                self._note(measured)
                measured = []
            if self.step % test_every == 0 or self.step == self.recipe.steps:
                self.curve[-1]["test_loss"] = round(held_out_loss(self.model, self.windows), 4)
                self.save()
            if not measured:
                print(json.dumps(self.curve[-1]), flush=True)

    def save(self) -> None:
        """Checkpoint and curve, each replaced as a whole."""
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        state |= {"step": self.step, "curve": self.curve, "recipe": asdict(self.recipe)}
        report = {"recipe": asdict(self.recipe), "corpus": self.corpus, "curve": self.curve}
        torch.save(state, self.run / "checkpoint.new")
        (self.run / "training.new").write_text(json.dumps(report, indent=1) + "\n")
        os.replace(self.run / "checkpoint.new", self.run / "checkpoint.pt")
        os.replace(self.run / "training.new", self.run / "training.json")

    def _note(self, measured: list[dict[str, float]]) -> None:
        means = {name: round(sum(one[name] for one in measured) / len(measured), 4) for name in measured[0]}
        tokens = self.step * self.recipe.tokens
        point = {
            "step": self.step,
            "tokens": tokens,
            "train_loss": means["loss"],
            "balance": means["balance"],
        }
        self.curve.append(point)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for name, p in self.model.named_parameters() if p.ndim > 1 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim == 1 or "embed" in name]
        return [
            {"params": matrices, "weight_decay": self.recipe.decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _resume(self) -> None:
        state = torch.load(self.run / "checkpoint.pt", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.run} holds a run of another recipe: {state['recipe']}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.curve = state["step"], state["curve"]


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, tokens=options.tokens, rate=options.rate)
    Training(options.corpus, options.run, recipe).train()


if __name__ == "__main__":
    main()
