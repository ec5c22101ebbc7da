"""Exact mode: the numbers of stock eager, whatever the budget, the readers and the layout of the checkpoint."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.moe.conftest import ALWAYS, mixtral, prompt, qwen, stock

from undercroft.errors import BudgetExceeded, CorruptRecord, InvalidInput, TransferFailed, UnsupportedModel
from undercroft.moe.governor import Governor
from undercroft.moe.load import expert_report, load_moe
from undercroft.moe.pack import pack
from undercroft.moe.packed import open_packed

EXPERT = 3 * 64 * 32 * 4  # bytes of one in float32; blocks around it add up to two of 4096
BANK = 3 * 16 * (EXPERT + 8192)
BUDGETS = {"one token": 4 * (EXPERT + 8192), "eighth": BANK // 8, "half": BANK // 2, "all": BANK}


def same(one: Any, other: Any, ids: torch.Tensor, tokens: int = 64) -> None:
    with torch.no_grad():
        first, second = one(input_ids=ids), other(input_ids=ids)
        assert torch.equal(first.logits, second.logits)
        step = ids[:, -1:]
        for _ in range(4):  # decoding with the cache that the prefill filled
            first = one(input_ids=step, past_key_values=first.past_key_values)
            second = other(input_ids=step, past_key_values=second.past_key_values)
            assert torch.equal(first.logits, second.logits)
            step = first.logits[:, -1:].argmax(-1)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(ids[:1], **options), other.generate(ids[:1], **options))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_bit_for_bit(checkpoint: Callable[..., Path], budget: int, readers: int, seed: int) -> None:
    folder = checkpoint(seed)
    same(stock(folder), load_moe(folder, budget, readers=readers, prefetch=False), prompt(seed=seed))


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_bit_for_bit_with_predictions(checkpoint: Callable[..., Path], share: float, readers: int) -> None:
    folder = checkpoint()
    model = load_moe(folder, int(share * BANK), readers=readers, prefetch=Governor(ALWAYS))
    same(stock(folder), model, prompt(), tokens=32)
    report = expert_report(model)
    assert report.predicted >= report.useful + report.wasted > 0


@pytest.fixture
def lossless(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A model in bfloat16 whose experts are packed in fewer bytes; the model itself is beside it."""
    folder = tmp_path / "model"
    stock(checkpoint(), torch.bfloat16).save_pretrained(folder)
    pack(folder, tmp_path / "packed", high="lossless", low="none")
    return tmp_path / "packed"


@pytest.mark.parametrize("budget", ["96KiB", "300KiB", "1MiB"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_bit_for_bit_in_fewer_bytes(lossless: Path, budget: str, prefetch: bool) -> None:
    with open_packed(lossless) as experts:
        assert experts.files[0][experts.layers[0].key(0, "lossless")].nbytes < 0.8 * EXPERT / 2
    governor = Governor(ALWAYS) if prefetch else False
    same(
        stock(lossless.parent / "model", torch.bfloat16),
        load_moe(lossless, budget, prefetch=governor),
        prompt(),
    )


def test_a_budget_too_small_to_restore_in_says_so(lossless: Path) -> None:
    with pytest.raises(BudgetExceeded, match="as they are computed with") as caught:
        load_moe(lossless, "20KiB")
    assert caught.value.least is not None
    load_moe(lossless, caught.value.least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [qwen, mixtral])
def test_batches_beams_and_sampling(
    checkpoint: Callable[..., Path], make: Callable[[int], Any], dtype: torch.dtype
) -> None:
    folder = checkpoint(make=make)
    one, other = stock(folder, dtype), load_moe(folder, BUDGETS["eighth"] + 2**17, dtype=dtype)
    ids = prompt(rows=3)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        found: list[torch.Tensor] = []
        for model in (one, other):
            torch.manual_seed(7)
            found.append(model.generate(ids, max_new_tokens=12, pad_token_id=0, **options))
        assert torch.equal(*found)


def test_shards_may_part_an_expert(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 10
    same(stock(folder), load_moe(folder, BUDGETS["half"]), prompt(), tokens=8)


def test_no_expert_is_resident(checkpoint: Callable[..., Path]) -> None:
    model = load_moe(checkpoint(), BUDGETS["all"])
    stacked = [name for name, tensor in model.named_parameters() if "experts." in name]
    assert stacked
    assert all(tensor.is_meta == (name in stacked) for name, tensor in model.named_parameters())


def test_nothing_is_left_when_a_model_goes(checkpoint: Callable[..., Path]) -> None:
    import threading

    folder = checkpoint()
    model = load_moe(folder, BUDGETS["half"])
    model(input_ids=prompt())
    del model
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("undercroft-io")]
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(folder) in _target(link)]


def _target(link: Path) -> str:
    return os.readlink(link) if link.is_symlink() else ""


def test_a_budget_below_one_expert_says_what_would_do(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        load_moe(checkpoint(), "4KiB")
    assert caught.value.least is not None
    load_moe(checkpoint(seed=1), caught.value.least)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no experts"):
        load_moe(tmp_path)


@pytest.mark.parametrize(
    "put_back", [False, True], ids=["plainly", "with the time of its last write put back"]
)
def test_a_file_changed_behind_its_back_is_noticed(checkpoint: Callable[..., Path], put_back: bool) -> None:
    folder = checkpoint()
    model = load_moe(folder, BUDGETS["one token"])
    model(input_ids=prompt())
    file = folder / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as writable:
        writable.seek(before.st_size // 2)
        writable.write(b"\xff" * 4096)
    if put_back:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptRecord, match="changed"):
        model(input_ids=prompt(length=40))


def test_a_file_cut_short_is_noticed(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    model = load_moe(folder, BUDGETS["one token"])
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises((CorruptRecord, TransferFailed)):
        model(input_ids=prompt(length=40))


def test_it_stays_where_it_is(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BUDGETS["half"])
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    for convert in (lambda: model.to(torch.bfloat16), lambda: model.to("meta"), model.half, model.double):
        with pytest.raises(UnsupportedModel, match="load_moe"):
            convert()


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saving_copies_the_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path, shard: str) -> None:
    folder = checkpoint(max_shard_size=shard)
    model: Any = load_moe(folder, BUDGETS["half"])
    with pytest.raises(InvalidInput, match="elsewhere"):
        model.save_pretrained(folder)
    with pytest.raises(InvalidInput, match="max_shard_size"):
        model.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    model.save_pretrained(tmp_path / "copy")
    same(stock(tmp_path / "copy"), model, prompt(), tokens=8)


def test_a_backward_is_refused(checkpoint: Callable[..., Path]) -> None:
    model: Any = load_moe(checkpoint(), BUDGETS["half"])
    embedded = model.get_input_embeddings()(prompt()).detach().requires_grad_()
    with pytest.raises(UnsupportedModel, match="inference"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        model(inputs_embeds=embedded)


def test_a_pipeline_takes_it(checkpoint: Callable[..., Path]) -> None:
    from transformers import PreTrainedTokenizerFast, pipeline

    from undercroft.models.fresh import Shape, write_fresh_model

    folder = checkpoint()
    write_fresh_model(folder / "words", Shape(layers=1, width=32, heads=2, vocabulary=128, longest=32), [""])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "words", pad_token="<end>")
    made = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)("ab", max_new_tokens=6, do_sample=False)
        for model in (stock(folder), load_moe(folder, BUDGETS["half"]))
    ]
    assert made[0] == made[1]
