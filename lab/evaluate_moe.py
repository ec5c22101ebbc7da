"""What a Mixture-of-Experts model of ours can do, at full precision and with quantised experts.

    python lab/evaluate_moe.py CORPUS MODEL                 # MODEL gets evaluation.json
    python lab/evaluate_moe.py CORPUS MODEL --export RUN    # first writes MODEL from the checkpoint of a training run

The second line finishes the bundled model but for its card, which `moe_card.py` writes. Quantised weights are put back
into the float32 model after quantising and dequantising, so the figures are those of what the weights lost, and of
nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from train_moe import held_out_loss, held_out_windows, new_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from undercroft.bundled.outliers import with_outliers
from undercroft.bundled.skills import SKILLS, Exercise, examination
from undercroft.kernels.format import Format
from undercroft.kernels.quantise import dequantise, quantise

WINDOW = 512
PER_SKILL = 30
FORMATS = ("int8", "int4", "int2")
OUTLIERS = 64


def export(corpus: Path, run: Path, folder: Path) -> None:
    """Write the model of a run's checkpoint in bfloat16, its tokenizer and its curve, replacing what was there."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    model = new_model(tokenizer, 0)
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(run / "training.json", folder)


class Subject:
    """A model under examination: its bfloat16 weights in a float32 model.

    Args:
        folder: of the model.
        outliers: scale of synthetic outlier channels, 1 for none.
    """

    def __init__(self, folder: Path, outliers: int = 1) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.set_experts_implementation("grouped_mm")
        self.model.generation_config.max_length = None
        with_outliers(self.model, outliers)
        self.model.eval()

    def losses(self, windows: dict[str, Tensor]) -> dict[str, float]:
        """Nats per token by domain."""
        losses = {domain: held_out_loss(self.model, rows) for domain, rows in windows.items()}
        self.model.eval()
        return losses

    @torch.no_grad()
    def answers(self, questions: list[str], batch: int = 60) -> Iterator[str]:
        """What the model writes, greedily, until its end token or 72 tokens."""
        for start in range(0, len(questions), batch):
            talks = [[{"role": "user", "content": question}] for question in questions[start : start + batch]]
            asked = self.tokenizer.apply_chat_template(
                talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            written = self.model.generate(**asked, max_new_tokens=72, do_sample=False)
            yield from self.tokenizer.batch_decode(
                written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
            )

    def marks(self, paper: list[Exercise]) -> dict[str, float]:
        """Percent of exercises with the exact result, by skill."""
        answers = self.answers([each.question for each in paper])
        asked = Counter(each.skill for each in paper)
        solved = Counter(
            each.skill for each, answer in zip(paper, answers, strict=True) if each.solved_by(answer)
        )
        return {skill: round(100 * solved[skill] / asked[skill], 1) for skill in SKILLS}

    @contextmanager
    def quantised(self, format: Format) -> Iterator[None]:
        """While it lasts, all experts have the weights that the format can express."""
        experts = {n: p for n, p in self.model.named_parameters() if ".experts." in n}
        before = {name: weights.detach().clone() for name, weights in experts.items()}
        with torch.no_grad():
            for weights in experts.values():
                flat = weights.flatten(0, 1)
                flat.copy_(dequantise(quantise(flat, format), format, *flat.shape))
        yield
        with torch.no_grad():
            for name, weights in experts.items():
                weights.copy_(before[name])


def report_of(subject: Subject, windows: dict[str, Tensor], paper: list[Exercise]) -> dict[str, Any]:
    """Losses and marks of a model as it is now."""
    losses, marks = subject.losses(windows), subject.marks(paper)
    mean = sum(losses.values()) / len(losses)
    return {
        "loss": round(mean, 4),
        "perplexity": round(math.exp(mean), 3),
        "loss_by_domain": {domain: round(loss, 4) for domain, loss in losses.items()},
        "exact_match": round(sum(marks.values()) / len(marks), 1),
        "exact_match_by_skill": marks,
    }


def worked(tokenizer: PreTrainedTokenizerFast, paper: list[Exercise]) -> Tensor:
    """Exercises with their solutions, packed into windows (rows, 512) int64, as in training."""
    texts = [f"{tokenizer.eos_token}Question: {each.question}\nAnswer: {each.solution}" for each in paper]
    tokens = torch.tensor([*chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"])])
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def routing(model: Any, windows: dict[str, Tensor]) -> list[dict[str, float]]:
    """By layer, how experts are used over the domains' windows; exercises are a domain like the others.

    Entropy of use as a share of its maximum, the least and the largest share of an expert (even use is 1 / experts),
    and the mutual information of expert and domain in bits: 0 where the domain does not matter.
    """
    counts: dict[int, list[Tensor]] = {}

    def record(layer: int, chosen: Tensor) -> None:
        counts.setdefault(layer, []).append(
            torch.bincount(chosen.flatten(), minlength=model.config.num_experts)
        )

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out, n=n: record(n, out[2]))
        for n, layer in enumerate(model.model.layers)
    ]
    for rows in windows.values():
        model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [_use(torch.stack(each).double()) for each in counts.values()]


def _use(counts: Tensor) -> dict[str, float]:
    joint = counts / counts.sum()
    domain, expert = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = torch.special.xlogy(joint, joint / (domain * expert)).nan_to_num().sum() / math.log(2)
    entropy = -torch.special.xlogy(expert, expert).sum() / math.log(expert.numel())
    values = {"entropy": entropy, "least": expert.min(), "largest": expert.max(), "domain_bits": information}
    return {name: round(float(value), 4) for name, value in values.items()}


class Ngrams:
    """Interpolated unigrams, bigrams and trigrams with absolute discounting (0.75), counted on the training text.

    Source: Ney, Essen, Kneser 1994, with the lower order's probabilities in the place of the discounted mass.
    """

    def __init__(self, text: np.ndarray, vocabulary: int) -> None:
        self.size = vocabulary
        self.unigrams = (np.bincount(text, minlength=vocabulary) + 0.1) / (len(text) + 0.1 * vocabulary)
        self.orders = [self._count(text, 1), self._count(text, 2)]

    def losses(self, windows: Tensor) -> list[float]:
        """Nats per token of windows (rows, length) under the three, from the third token of a row on."""
        text = windows.numpy()
        following = text[:, 2:]
        found = [self.unigrams[following]]
        for order, table in enumerate(self.orders, 1):
            context = self._context([text[:, 2 - n : text.shape[1] - n] for n in range(order, 0, -1)])
            found.append(self._probability(table, context, following, found[-1]))
        return [float(-np.log(each).mean()) for each in found]

    def _context(self, tokens: list[np.ndarray]) -> np.ndarray:
        context = np.zeros_like(tokens[0])
        for each in tokens:
            context = context * self.size + each
        return context

    def _count(self, text: np.ndarray, order: int) -> tuple[np.ndarray, ...]:
        """Distinct n-grams and their counts; their contexts, how often each occurred and what number followed it."""
        context = self._context([text[n : len(text) - order + n] for n in range(order)])
        grams, counts = np.unique(context * self.size + text[order:], return_counts=True)
        contexts, first, kinds = np.unique(grams // self.size, return_index=True, return_counts=True)
        return grams, counts, contexts, np.add.reduceat(counts, first), kinds

    def _probability(
        self, table: tuple[np.ndarray, ...], context: np.ndarray, following: np.ndarray, lower: np.ndarray
    ) -> np.ndarray:
        grams, counts, contexts, totals, kinds = table
        count = _look_up(grams, counts, context * self.size + following)
        total, kind = _look_up(contexts, totals, context), _look_up(contexts, kinds, context)
        found = (np.maximum(count - 0.75, 0) + 0.75 * kind * lower) / np.maximum(total, 1)
        return np.where(total > 0, found, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def baselines(corpus: Path, windows: dict[str, Tensor], vocabulary: int) -> dict[str, float]:
    """Nats per token of n-grams over all windows."""
    arrays = np.load(corpus / "corpus.npz")
    text = np.concatenate([arrays[name] for name in arrays if name.startswith("train_")]).astype(np.int64)
    losses = Ngrams(text, vocabulary).losses(torch.cat(list(windows.values())))
    return {name: round(loss, 4) for name, loss in zip(("unigram", "bigram", "trigram"), losses, strict=True)}


def evaluate(corpus: Path, folder: Path) -> dict[str, Any]:
    """Everything that evaluation.json says."""
    plain, windows, paper = Subject(folder), held_out_windows(corpus, WINDOW), examination(PER_SKILL)
    return {
        "tokens": sum(rows.numel() for rows in windows.values()),
        "exercises": len(paper),
        "parameters": sum(p.numel() for p in plain.model.parameters()),
        "nbytes": (folder / "model.safetensors").stat().st_size,
        "baselines": baselines(corpus, windows, len(plain.tokenizer)),
        "routing": routing(plain.model, {**windows, "exercises": worked(plain.tokenizer, paper)}),
        "experts": {"bfloat16": report_of(plain, windows, paper), **in_formats(plain, windows, paper)},
        "outliers": OUTLIERS,
        "experts_with_outliers": in_formats(Subject(folder, OUTLIERS), windows, paper),
    }


def in_formats(subject: Subject, windows: dict[str, Tensor], paper: list[Exercise]) -> dict[str, Any]:
    """A report for each format of the experts."""
    reports: dict[str, Any] = {}
    for name in FORMATS:
        with subject.quantised(Format.parse(name)):
            reports[name] = report_of(subject, windows, paper)
    return reports


def main() -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--export", type=Path, metavar="RUN")
    options = parser.parse_args()
    if options.export:
        export(options.corpus, options.export, options.model)
    report = evaluate(options.corpus, options.model)
    (options.model / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
