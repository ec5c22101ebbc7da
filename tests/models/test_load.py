"""Opening models: what is refused, and what the refusal tells the user to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from undercroft import CorruptRecord, InvalidInput, TransferFailed, UnsupportedModel
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.models.load import open_causal_model, open_tokenizer

SHAPE = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=32)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    write_fresh_model(folder, SHAPE, ["the cat sat on the mat"])
    return folder


@pytest.fixture
def copied(fresh: Path, tmp_path: Path) -> Path:
    """A folder of one's own to spoil."""
    return Path(shutil.copytree(fresh, tmp_path / "model"))


def test_a_model_has_the_weights_of_its_file_in_float32(fresh: Path) -> None:
    model = open_causal_model(fresh)
    stored = load_file(fresh / "model.safetensors")
    found = dict(model.module.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in stored.items())
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert (model.longest, model.vocabulary) == (32, open_tokenizer(fresh).size)
    assert model.logits(torch.tensor([[1, 2, 3]])).shape == (1, 3, model.vocabulary)


def test_the_same_seed_makes_the_same_files(fresh: Path, tmp_path: Path) -> None:
    write_fresh_model(tmp_path, SHAPE, ["the cat sat on the mat"])
    for file in fresh.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_stored_precision_is_kept_on_request(copied: Path) -> None:
    model = open_causal_model(copied)
    model.module.to(torch.bfloat16)
    model.save(copied)
    assert {weight.dtype for weight in open_causal_model(copied).trainable().values()} == {torch.float32}
    stored = open_causal_model(copied, precision="stored").trainable().values()
    assert {weight.dtype for weight in stored} == {torch.bfloat16}


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", ""])
def test_a_path_that_is_not_there_is_invalid_input(source: str) -> None:
    with pytest.raises(InvalidInput, match="there is no folder"):
        open_tokenizer(source or Path("nothing"))


def test_a_file_in_the_place_of_a_folder_is_invalid_input(fresh: Path) -> None:
    with pytest.raises(InvalidInput, match="is a file; name the folder"):
        open_causal_model(fresh / "config.json")


def test_a_hub_name_without_a_network_tells_how_to_get_the_files() -> None:
    with pytest.raises(TransferFailed, match=r"hf download nobody/nothing --local-dir DIR"):
        open_tokenizer("nobody/nothing")


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        open_tokenizer(tmp_path)


def test_a_damaged_configuration_is_said(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be opened"):
        open_tokenizer(copied)


def test_an_adapter_is_no_model(copied: Path) -> None:
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="merge it"):
        open_causal_model(copied)


def test_pickled_weights_are_never_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled"):
        open_causal_model(copied)


def test_missing_weights_are_not_made_up(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    lost = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert lost.numel()
    with pytest.raises(UnsupportedModel, match=r"lacks 1 weights .*model\.layers\.0\.mlp\.up_proj\.weight"):
        open_causal_model(copied)


def test_damaged_weights_are_a_corrupt_record(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptRecord, match="damaged"):
        open_causal_model(copied)


def test_code_of_the_checkpoint_is_not_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "home-made", "auto_map": {"AutoConfig": "evil.Config"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(UnsupportedModel, match="code of its own"):
        open_tokenizer(copied)


def test_without_a_tokenizer_the_missing_files_are_named(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"copy tokenizer\.json"):
        open_tokenizer(copied)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_an_encoder_is_not_causal(kind: type[BertForMaskedLM], tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"is a {kind.__name__}, not a causal language model"):
        open_tokenizer(tmp_path)


def test_a_decoder_whose_configuration_says_it_is_none_is_causal_all_the_same(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    assert config.is_decoder is False
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert open_causal_model(tmp_path).vocabulary == 30
