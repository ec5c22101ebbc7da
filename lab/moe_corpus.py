"""The text that the bundled Mixture-of-Experts model is trained on, and its tokenizer, rebuilt from Debian packages.

    python lab/moe_corpus.py FOLDER

writes FOLDER/corpus.npz (token numbers), FOLDER/corpus.json (what they are made of) and FOLDER/tokenizer/. It needs
`apt-get` and `dpkg-deb`; packages that already lie in FOLDER/packages are not fetched again. Invariant: equal packages
give equal files; a document lies on one side of the split as a whole.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from undercroft.bundled.skills import exercises

VOCABULARY = 2048
TEST_SHARE = 0.03
END, PAD = "<|end|>", "<|pad|>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}Answer: {{ m['content'] }}<|end|>"
    "{% else %}Question: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
PACKAGES = {
    "bible-kjv": "program that unpacks the next one (GPL-2+; nothing of it enters the text)",
    "bible-kjv-text": "King James Bible (public domain)",
    "jargon-text": "Jargon File 4.4.7 (public domain)",
    "python3.11-doc": "documentation of Python 3.11 (PSF-2.0)",
    "libpython3.11-minimal": "sources of Python's standard library (PSF-2.0)",
    "libpython3.11-stdlib": "sources of Python's standard library (PSF-2.0)",
}


def fetch(folder: Path) -> Path:
    """The packages' files, unpacked under one root."""
    packages, root = folder / "packages", folder / "root"
    packages.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not any(packages.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=packages, check=True)
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    return root


def scripture(root: Path) -> Iterator[str]:
    """The Bible by chapters, a verse per line."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "-l", "10000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    verses = [line.partition(" ") for line in printed.splitlines() if ":" in line[:9]]
    for chapter, lines in groupby(verses, key=lambda verse: verse[0].partition(":")[0]):
        yield f"{chapter}\n" + "\n".join(text for _, _, text in lines)


def manual(root: Path) -> Iterator[str]:
    """Python's documentation by pages."""
    for page in sorted((root / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt*")):
        if "changelog" not in page.name:
            yield gzip.decompress(page.read_bytes()).decode() if page.suffix == ".gz" else page.read_text()


def source(root: Path) -> Iterator[str]:
    """Python's standard library by files."""
    left_out = re.compile(r"/(test|tests|encodings|pydoc_data|lib2to3|idlelib|__phello__)/|_sysconfigdata")
    for file in sorted((root / "usr/lib/python3.11").rglob("*.py")):
        if not left_out.search(str(file)) and 300 < file.stat().st_size < 300_000:
            yield file.read_text(errors="ignore")


def jargon(root: Path) -> Iterator[str]:
    """The Jargon File by pieces of about 8 KB, without its tables."""
    path = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode(errors="ignore").splitlines()
    text = "\n".join(line for line in lines if not re.search("[\u2500-\u257f]", line))
    paragraphs = iter(re.split(r"\n\s*\n", text))
    while piece := list(islice(paragraphs, 25)):
        yield "\n\n".join(piece)


DOMAINS: dict[str, tuple[Callable[[Path], Iterator[str]], int]] = {
    "scripture": (scripture, 5_000_000),
    "manual": (manual, 9_000_000),
    "source": (source, 5_000_000),
    "jargon": (jargon, 2_000_000),
}
"""Where documents come from, and the most characters that are taken of each kind."""


def documents(root: Path, domain: str) -> list[str]:
    """The documents of a domain without repetitions, in an order that depends on their text only."""
    make, most = DOMAINS[domain]
    unique = {_rank(text): text for text in map(_clean, make(root)) if len(text) > 200}
    taken: list[str] = []
    for _, text in sorted(unique.items()):
        if most <= 0:
            break
        taken.append(text)
        most -= len(text)
    return taken


def _clean(text: str) -> str:
    ascii_text = text.encode("ascii", "ignore").decode()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", ascii_text)).strip()


def _rank(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def train_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose digits stand alone, saved into a folder."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token numbers (uint16) of texts one after the other, each closed by the end token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*numbers, end], np.uint16) for numbers in encoded])


def build(folder: Path) -> dict[str, Any]:
    """Make everything; returns what corpus.json says."""
    root = fetch(folder)
    sides: dict[str, dict[str, list[str]]] = {}
    for domain in DOMAINS:
        texts = documents(root, domain)
        test = {text for text in texts if _rank("split" + text) < TEST_SHARE}
        sides[domain] = {
            "train": [t for t in texts if t not in test],
            "test": [t for t in texts if t in test],
        }
    drill = [
        f"Question: {e.question}\nAnswer: {e.solution}" for e in islice(exercises("train", Random(1)), 8000)
    ]
    sample = [text[:20_000] for side in sides.values() for text in side["train"]]
    tokenizer = train_tokenizer(sample + drill, folder / "tokenizer")
    arrays = {
        f"{side}_{domain}": encode(tokenizer, texts)
        for domain, both in sides.items()
        for side, texts in both.items()
    }
    np.savez(folder / "corpus.npz", **arrays)  # type: ignore[arg-type]
    return _report(folder, sides, arrays)


def _report(folder: Path, sides: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    report = {
        "packages": {path.name: PACKAGES[path.name.partition("_")[0]] for path in _packages(folder)},
        "domains": {
            domain: {
                side: {"characters": sum(map(len, texts)), "tokens": len(arrays[f"{side}_{domain}"])}
                for side, texts in both.items()
            }
            for domain, both in sides.items()
        },
        "blake2b": hashlib.blake2b(
            b"".join(a.tobytes() for a in arrays.values()), digest_size=16
        ).hexdigest(),
    }
    (folder / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _packages(folder: Path) -> list[Path]:
    return sorted((folder / "packages").glob("*.deb"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(json.dumps(build(parser.parse_args().folder), indent=1))
