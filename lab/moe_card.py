"""The card of the bundled Mixture-of-Experts model, written from the files that training and evaluation left.

    python lab/moe_card.py MODEL benchmarks/results/quality.json

Every figure of the card comes from MODEL/training.json, MODEL/evaluation.json, MODEL/config.json, or from what
`undercroft bench quality --results benchmarks/results` wrote.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from undercroft.bundled.skills import HELD_OUT_PERCENT

CARD = """\
# The bundled Mixture-of-Experts model

A Qwen3-MoE of {millions:.1f} million parameters ({size:.1f} MB), trained by this project on two CPU cores, so that
streamed and quantised experts can be tried with real weights where no model hub can be reached. It continues English
technical and biblical prose and solves eight kinds of small exercises. It is no assistant; what it says is often false.

{num_hidden_layers} layers; {num_local_experts} experts per layer, {num_experts_per_tok} of them for each token;
hidden size {hidden_size}, intermediate size of an expert {moe_intermediate_size};
{num_attention_heads} attention heads, {num_key_value_heads} key-value heads;
{vocab_size} byte-level tokens; context {max_position_embeddings}.
The weights have the licence of the project.

## Data

{tokens:.2f} million tokens ({characters:.1f} million characters) from Debian packages, which are not in the repository:

{packages}

Documents are held out as a whole, {test_tokens} tokens of them. A quarter of each step are exercises of
`undercroft.bundled.skills`, made up on the spot; {held_out} % of their facts, whatever the wording, are held out.

## Training

{done} of {steps} steps of {step_tokens} tokens, {windows};
AdamW, learning rate {rate}, float32; load is balanced layer by layer. To do it again (another number of threads or
another version of PyTorch may change last bits, and with them the weights):

    python lab/moe_corpus.py CORPUS
    python lab/train_moe.py CORPUS RUN
    python lab/evaluate_moe.py CORPUS MODEL --export RUN
    undercroft bench quality --results benchmarks/results
    python lab/moe_card.py MODEL benchmarks/results/quality.json

{curve}

Losses are nats per token: of text and solutions together while training, of text only in the test, where the four
domains count alike.

## What it can do

{eval_tokens} held-out tokens in windows of 512, the four domains alike: {loss:.3f} nats per token. Counting on the same
training text gives {unigram:.3f} (unigrams), {bigram:.3f} (bigrams) and {trigram:.3f} (trigrams, absolute discounting).

{domains}

{exercises} held-out exercises, greedy, exact match in percent (standard error of the mean: {error:.1f} points):

{marks}

## Quantised experts

Only the experts are quantised, in groups of 32. The rows "with outliers" are of the same function rescaled by
`undercroft.bundled.outliers.with_outliers(model, {outliers})`: **synthetic** outlier channels that stand for those of
large models.

{formats}

## Qualities

As `undercroft bench quality` found them: {held:.0%} of the experts in memory, windows of {read} tokens that it
was not trained on, read one by one. The change is against full precision; the low mass is the share of the gate mass
that was served by low copies. "synthetic outliers" is the model rescaled as above.

{qualities}

## Routing

On the held-out text and exercises. Even use would be an entropy of 1 and a share of {even:.4f} for each expert.

{routing}
"""


def card_of(folder: Path, quality: Path) -> str:
    """The card as text."""
    found = json.loads(quality.read_text())["figures"]
    training, evaluation, config = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("training", "evaluation", "config")
    )
    full = evaluation["experts"]["bfloat16"]
    share = full["exact_match"] / 100
    figures = {**config, **_data(training["corpus"]), **_training(training), **evaluation["baselines"]}
    return CARD.format(
        **figures,
        millions=evaluation["parameters"] / 1e6,
        size=evaluation["nbytes"] / 1e6,
        eval_tokens=evaluation["tokens"],
        loss=full["loss"],
        domains=_table(("domain", "nats per token"), full["loss_by_domain"].items()),
        exercises=evaluation["exercises"],
        error=100 * math.sqrt(share * (1 - share) / evaluation["exercises"]),
        marks=_table((*full["exact_match_by_skill"], "mean"), [_marks(full)]),
        outliers=evaluation["outliers"],
        formats=_formats(evaluation),
        held=found["settings"]["share"],
        read=found["settings"]["length"],
        qualities=_qualities(found["runs"]),
        even=1 / config["num_local_experts"],
        routing=_routing(evaluation["routing"]),
    )


def _data(corpus: dict[str, Any]) -> dict[str, Any]:
    sides = list(corpus["domains"].values())
    return {
        "characters": sum(side["train"]["characters"] for side in sides) / 1e6,
        "tokens": sum(side["train"]["tokens"] for side in sides) / 1e6,
        "test_tokens": sum(side["test"]["tokens"] for side in sides),
        "held_out": HELD_OUT_PERCENT,
        "packages": "\n".join(f"- `{name}`: {what}" for name, what in corpus["packages"].items()),
    }


def _training(training: dict[str, Any]) -> dict[str, Any]:
    recipe, curve = training["recipe"], training["curve"]
    tested = [point for point in curve if "test_loss" in point]
    shown = [
        point for point in tested if point["step"] % 1000 == 0 or point is tested[-1] or point is tested[0]
    ]
    names = ("step", "tokens", "train_loss", "test_loss")
    before, after = recipe["windows"]
    return {
        "done": curve[-1]["step"],
        "steps": recipe["steps"],
        "step_tokens": recipe["tokens"],
        "rate": recipe["rate"],
        "windows": f"windows of {before} tokens, of {after} from step {round(recipe['widen'] * recipe['steps'])} on",
        "curve": _table(names, ([point[name] for name in names] for point in shown)),
    }


def _marks(report: dict[str, Any]) -> list[float]:
    return [*report["exact_match_by_skill"].values(), report["exact_match"]]


def _formats(evaluation: dict[str, Any]) -> str:
    full = evaluation["experts"]["bfloat16"]["perplexity"]
    named = {
        **evaluation["experts"],
        **{f"{name}, with outliers": each for name, each in evaluation["experts_with_outliers"].items()},
    }
    rows = (
        (name, each["perplexity"], f"{each['perplexity'] / full:.3f}", each["exact_match"])
        for name, each in named.items()
    )
    return _table(("experts", "perplexity", "ratio", "exact match %"), rows)


def _qualities(runs: list[dict[str, Any]]) -> str:
    names = ("model", "quality", "perplexity", "change", "same likeliest token", "low mass", "exact match %")
    rows = (
        (
            each["model"],
            each["quality"],
            f"{each['perplexity']:.3f}",
            f"{each['fidelity']['perplexity_change']:+.2%}",
            f"{each['fidelity']['top_agreement']:.1%}",
            f"{each['low_mass']:.1%}",
            "" if each["exact_match"] is None else f"{each['exact_match']:.1f}",
        )
        for each in runs
    )
    return _table(names, rows)


def _routing(layers: list[dict[str, float]]) -> str:
    names = ("layer", "entropy of use", "least share", "largest share", "bits about the domain")
    return _table(names, ((number, *layer.values()) for number, layer in enumerate(layers)))


def _table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(names)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    model, quality = map(Path, sys.argv[1:])
    (model / "README.md").write_text(card_of(model, quality))
