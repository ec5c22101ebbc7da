"""llama.cpp or its kin as one side of `peers`: it decodes as many tokens as each line it reads says.

Run as ``PYTHON llama_worker.py SETTINGS`` by a Python that has the library and nothing of ours; SETTINGS and the
answers are those of `peers_worker`. It speaks to the library below its sampling, so that the tokens are given, as on
every side. Under a memory limit weights are mapped and used where they lie, for a repacked copy would fill the limit.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}
"""Where the C functions are, by side."""
_MAP = 1


class Decoder:
    """A model and its context.

    Args:
        settings: of `peers_worker.PeerSettings`, as a mapping.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._api: Any = importlib.import_module(MODULES[settings["side"]])
        self._vocabulary: int = settings["vocabulary"]
        self._api.llama_backend_init()
        model = self._api.llama_model_load_from_file(settings["model"].encode(), self._model(settings))
        if not model:
            raise SystemExit(f"{settings['side']} cannot load {settings['model']}")
        self._context: Any = self._api.llama_init_from_model(model, self._context_options(settings))
        self._batch: Any = self._api.llama_batch_init(settings["prompt"], 0, 1)
        self._at = 0

    def step(self, tokens: Sequence[int]) -> None:
        """Go on with these tokens, in one call; the last one's logits are computed."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self._at + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(tokens) - 1
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")
        self._at += len(tokens)
        self._last = len(tokens) - 1
        self.logits()

    def logits(self) -> list[float]:
        """Those of the last token; asking for them waits until they are there."""
        found: Any = self._api.llama_get_logits_ith(self._context, self._last)
        return list(found[: self._vocabulary])

    def _model(self, settings: dict[str, Any]) -> Any:
        options = self._api.llama_model_default_params()
        is_limited: bool = settings["limited"]
        if hasattr(options, "load_mode"):
            options.load_mode = _MAP if is_limited else options.load_mode
            options.use_extra_bufts = not is_limited
        else:
            options.use_mmap = True
            options.repack_tensors = not is_limited
        return options

    def _context_options(self, settings: dict[str, Any]) -> Any:
        options = self._api.llama_context_default_params()
        options.n_ctx = settings["longest"]
        options.n_batch = options.n_ubatch = settings["prompt"]
        options.n_threads = options.n_threads_batch = settings["threads"]
        return options


def main() -> None:
    """Load, read the prompt, warm up, then serve stretches until the input ends."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    draw = random.Random(settings["seed"])
    tokens = [draw.randrange(settings["vocabulary"]) for _ in range(settings["longest"])]
    began = time.perf_counter()
    decoder = Decoder(settings)
    at = settings["prompt"]
    decoder.step(tokens[:at])
    _tell(seconds=time.perf_counter() - began, logits=decoder.logits())
    for line in sys.stdin:
        count = int(line)
        read, cpu, began = _read(), time.process_time(), time.perf_counter()
        for token in tokens[at : at + count]:
            decoder.step([token])
        seconds = time.perf_counter() - began
        _tell(tokens=count, seconds=seconds, cpu=time.process_time() - cpu, read=_read() - read)
        at += count


def _read() -> int:
    """Bytes that this process had the disk deliver, mapped pages included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _tell(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
