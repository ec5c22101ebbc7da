"""One of our ways, or accelerate's, to decode with a model larger than memory, in a process of its own.

Run as ``python -m undercroft.bench.peers_worker SETTINGS``, where SETTINGS is JSON of `PeerSettings`. It loads the
model and reads the prompt, and says so with a line of JSON: seconds and the last token's logits. Then each line read,
a number, is answered by a line of JSON, a `Stretch` of as many tokens. The tokens are drawn from the seed alone, so
that every side computes the same, whatever it would have said itself.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from undercroft.models.load import be_quiet
from undercroft.moe.load import expert_report, load_moe
from undercroft.moe.quality import Quality

ACCELERATE = "accelerate"
_QUALITIES = {
    "exact": Quality.preset("exact"),
    "lossless": Quality.preset("exact"),
    "balanced": Quality.preset("balanced"),
    "int8": Quality(low=0.0, low_precision=None, high="int8", dense="int8"),
}
OURS = tuple(_QUALITIES)
_OUTER = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
_RESIDENT = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """What a side is to do.

    Attributes:
        side: one of `OURS`, `ACCELERATE`, or a name that `llama_worker` knows.
        model: file or folder.
        budget: bytes of experts in memory, of ours.
        limited: whether memory is.
        prompt: tokens of the prefill.
        longest: tokens in all.
        vocabulary: different ones.
        threads: for computing.
        seed: of the tokens.
    """

    side: str
    model: str
    budget: int
    limited: bool
    prompt: int
    longest: int
    vocabulary: int
    threads: int
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some decoded tokens.

    Attributes:
        tokens: how many.
        seconds: of wall.
        cpu: seconds, of all threads.
        read: bytes that the disk delivered, mapped pages included.
        missed: bytes of the experts that were not in memory; None where nobody counts.
        waited: seconds in which computing stood still for them.
    """

    tokens: int
    seconds: float
    cpu: float
    read: int
    missed: int | None = None
    waited: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Decoder:
    """A model of transformers and its cache of keys and values."""

    def __init__(self, settings: PeerSettings) -> None:
        self._is_ours = settings.side in _QUALITIES
        self._model: Any = _open(settings) if self._is_ours else _offloaded(Path(settings.model))
        self._past: Any = None

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> list[float]:
        """Go on with these tokens, in one forward; the last one's logits."""
        ids = torch.tensor([tokens])
        out: Any = self._model(input_ids=ids, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = out.past_key_values
        return out.logits[0, -1].tolist()

    def stretch(self, tokens: Sequence[int]) -> Stretch:
        """Decode token by token."""
        read, (missed, waited) = _read(), self._spent()
        cpu, began = time.process_time(), time.perf_counter()
        for token in tokens:
            self.step([token])
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        missed_now, waited_now = self._spent()
        return Stretch(
            tokens=len(tokens),
            seconds=seconds,
            cpu=cpu,
            read=_read() - read,
            missed=missed_now - missed if self._is_ours else None,
            waited=waited_now - waited,
        )

    def _spent(self) -> tuple[int, float]:
        if not self._is_ours:
            return 0, 0.0
        report = expert_report(self._model)
        return report.read_nbytes, report.waited_seconds


def _open(settings: PeerSettings) -> Any:
    return load_moe(settings.model, budget=settings.budget, quality=_QUALITIES[settings.side])


def _offloaded(folder: Path) -> Any:
    """Only the experts are on disk; they are mapped, so that the page cache holds what fits."""
    layers: int = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    places: dict[str, str] = dict.fromkeys(_OUTER, "cpu")
    for layer in range(layers):
        places.update({f"model.layers.{layer}.{name}": "cpu" for name in _RESIDENT})
        places[f"model.layers.{layer}.mlp.experts"] = "disk"
    transformers: Any = importlib.import_module("transformers")  # the peer: no part of ours
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=places, offload_folder=str(folder / "unused")
    )


def _read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    """Load, read the prompt, then serve stretches until the input ends."""
    settings = PeerSettings(**json.loads(sys.argv[1]))
    be_quiet()
    torch.set_num_threads(settings.threads)
    draw = random.Random(settings.seed)
    tokens = [draw.randrange(settings.vocabulary) for _ in range(settings.longest)]
    began = time.perf_counter()
    decoder = Decoder(settings)
    at = settings.prompt
    logits = decoder.step(tokens[:at])
    print(json.dumps({"seconds": time.perf_counter() - began, "logits": logits}), flush=True)
    for line in sys.stdin:
        count = int(line)
        print(json.dumps(asdict(decoder.stretch(tokens[at : at + count]))), flush=True)
        at += count


if __name__ == "__main__":
    main()
