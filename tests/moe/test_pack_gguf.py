"""Packing GGUF files: the weights are those of the file, and of the model that it was made from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import SMALL, prompt, qwen
from tests.moe.families import fill
from tests.moe.gguf_files import TOKENS, rounded, write_gguf
from tests.moe.test_pack import Stop, at, content, stop
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from undercroft.errors import CorruptRecord, InvalidInput, UnsupportedModel
from undercroft.models.gguf_checkpoint import GgufCheckpoint
from undercroft.moe.load import load_moe
from undercroft.moe.pack import pack

pytestmark = pytest.mark.usefixtures("nothing_left")


def qwen3(seed: int, **changes: Any) -> Any:
    return qwen(seed, norm_topk_prob=True, **changes)


def qwen2(seed: int, **changes: Any) -> Any:
    sizes = {**SMALL, "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **changes}))
    fill(model, seed)
    return model


def logits(folder: Path) -> torch.Tensor:
    model = load_moe(folder, budget="64MiB")
    with torch.no_grad():
        return model(prompt(2)).logits


def stock_logits(model: Any) -> torch.Tensor:
    """What transformers computes with weights that begin as those do that it makes of a GGUF file: at whole lines."""
    opener: Any = AutoModelForCausalLM
    fresh = opener.from_config(model.config, dtype=model.dtype, experts_implementation="eager").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        return fresh(prompt(2)).logits


@pytest.mark.parametrize("make", [qwen3, qwen2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_in_float32_packs_to_the_model_it_was_made_from(
    make: Callable[..., Any], tied: bool, tmp_path: Path
) -> None:
    model = make(0, tie_word_embeddings=tied)
    pack(write_gguf(model, tmp_path / "m.gguf"), tmp_path / "out", high="keep", low="none")
    assert torch.equal(logits(tmp_path / "out"), stock_logits(model))


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
@pytest.mark.parametrize("make", [qwen3, qwen2])
def test_a_file_in_half_precision_packs_to_the_model_it_was_made_from(
    make: Callable[..., Any], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(0).to(dtype)
    pack(write_gguf(model, tmp_path / "m.gguf", kind), tmp_path / "out")
    found = logits(tmp_path / "out")
    assert found.dtype == dtype
    assert torch.equal(found, stock_logits(model))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("make", [qwen3, qwen2])
def test_quantised_weights_are_rounded_to_bfloat16(
    make: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    pack(write_gguf(make(0), tmp_path / "m.gguf", kind), tmp_path / "out", high="lossless")
    assert torch.equal(logits(tmp_path / "out"), stock_logits(rounded(make(0), kind)))


def test_types_may_be_mixed_as_in_the_files_that_people_share(tmp_path: Path) -> None:
    kinds = {"ffn_down_exps": "Q8_0", "token_embd": "F16", "output.weight": "BF16", "attn_v": "F32"}
    source = write_gguf(qwen3(0), tmp_path / "m.gguf", "Q5_0", kinds=kinds)
    with GgufCheckpoint(source) as checkpoint:
        dtypes = {name: checkpoint[name].dtype for name in checkpoint}
        for name, tensor in qwen3(0).state_dict().items():
            if "v_proj" in name or "norm" in name:
                assert torch.equal(checkpoint.read(checkpoint[name]), tensor)
    assert dtypes["model.layers.0.self_attn.v_proj.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.float16
    assert {dtype for name, dtype in dtypes.items() if ".experts." in name} == {torch.bfloat16}
    pack(source, tmp_path / "out", low="int2")
    assert logits(tmp_path / "out").dtype == torch.bfloat16


def test_any_run_of_a_quantised_tensor_is_that_part_of_it(tmp_path: Path) -> None:
    with GgufCheckpoint(write_gguf(qwen3(0), tmp_path / "m.gguf", "Q4_0")) as checkpoint:
        tensor = checkpoint["model.layers.1.mlp.experts.3.up_proj.weight"]
        whole = checkpoint.read(tensor).view(torch.uint8).reshape(-1)
        for start, nbytes in ((0, 2), (2, 126), (62, 4), (128, 512), (tensor.nbytes - 2, 2), (4, 0)):
            content = bytearray(nbytes)
            checkpoint.read_run(tensor, start, memoryview(content))
            assert content == bytes(whole[start : start + nbytes].tolist())


def test_it_says_what_the_model_said(tmp_path: Path) -> None:
    model = qwen3(0, moe_intermediate_size=96, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    pack(write_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=True), tmp_path / "out")
    found, wanted = (
        json.loads(text)
        for text in ((tmp_path / "out" / "config.json").read_text(), model.config.to_json_string())
    )
    same = {name for name, value in wanted.items() if found.get(name) == value}
    for name in ("hidden_size", "head_dim", "num_local_experts", "moe_intermediate_size", "rope_parameters"):
        assert name in same
    assert found["dtype"] == "bfloat16"
    assert found["eos_token_id"] == len(TOKENS) - 1


def test_it_brings_its_tokenizer(tmp_path: Path) -> None:
    pack(write_gguf(qwen3(0), tmp_path / "m.gguf", tokenizer=True), tmp_path / "out", low="none")
    opener: Any = AutoTokenizer
    tokenizer = opener.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("hello hello") == ["hell", "o", "Ġ", "hell", "o"]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he"
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*token*"))


def test_files_beside_it_are_not_part_of_it(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf", tokenizer=True)
    pack(source, tmp_path / "alone")
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    (tmp_path / "config.json").write_text("{}")
    pack(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_several_files_are_one_model(tmp_path: Path) -> None:
    write_gguf(qwen3(0), tmp_path / "m.gguf", tokenizer=True, shards=7)
    first, *rest = sorted(tmp_path.glob("m-*.gguf"))
    assert len(rest) > 2
    pack(first, tmp_path / "out", low="none")
    assert torch.equal(logits(tmp_path / "out"), stock_logits(qwen3(0)))
    rest[0].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CorruptRecord, match="file 1 of 6, counted from 0"):
        pack(tmp_path / "elsewhere.gguf", tmp_path / "other")
    with pytest.raises(InvalidInput, match=r"is one of 6 files, and m-00002-of-00006\.gguf is not beside it"):
        pack(first, tmp_path / "other")


def test_killed_and_run_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf", "Q8_0", tokenizer=True)
    with pytest.raises(Stop):
        pack(source, tmp_path / "out", on_progress=at(20, stop))
    assert pack(source, tmp_path / "out").kept_layers == 1
    pack(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert pack(source, tmp_path / "out").kept_layers == 3


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(CorruptRecord, match="was changed while it was in use"):
        pack(source, tmp_path / "out", on_progress=at(20, lambda: os.utime(source)))
    with pytest.raises(CorruptRecord, match=r"m\.gguf was changed since .*unfinished was written"):
        pack(source, tmp_path / "out")


def test_it_is_known_by_how_it_begins(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf").rename(tmp_path / "sha256-0123")
    assert pack(source, tmp_path / "out").experts == 48


def test_what_is_not_packed_yet_is_not_opened(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf")
    with pytest.raises(
        InvalidInput, match=r"pack it first, and name that folder: undercroft pack \S+m\.gguf FOLDER"
    ):
        load_moe(source)
    with pytest.raises(UnsupportedModel, match=r"holds GGUF files; .* undercroft pack \S+m\.gguf FOLDER"):
        load_moe(tmp_path)
    with pytest.raises(InvalidInput, match="there is no"):
        pack("none.gguf", tmp_path / "out")


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes().replace(b"qwen3moe", b"llama4xy"))
    with pytest.raises(
        UnsupportedModel, match="of the family llama4xy; of GGUF files, those of qwen2moe and qwen3moe"
    ):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    source = write_gguf(qwen3(0), tmp_path / "m.gguf")
    script = (
        "import sys; sys.modules['gguf'] = None\n"  # as if it were not installed
        "import undercroft\n"
        "try: undercroft.pack(*sys.argv[1:])\n"
        "except undercroft.MissingExtra as error: print(error)"
    )
    command = [sys.executable, "-c", script, source, tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout == (
        "packing a GGUF file needs an optional dependency: pip install 'undercroft[gguf]'\n"
    )
