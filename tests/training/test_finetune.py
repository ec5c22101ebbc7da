"""Fine-tuning: the same bits however activations are kept and however often it is interrupted; nothing left behind."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from undercroft import (
    BudgetExceeded,
    CorruptRecord,
    FinetuneSettings,
    InvalidInput,
    TierFull,
    UndercroftError,
    UnsafeDirectory,
    UnsupportedModel,
    WrongVersion,
    finetune,
)
from undercroft.models.fresh import Shape, write_fresh_model
from undercroft.training.finetune_report import FinetuneReport, StepReport
from undercroft.training.interrupt import Interrupted
from undercroft.training.schedule import learning_rate_at

Mount = Callable[..., Path]
TEXT = "the cat sat on the mat and thought about the dog next door. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with dropout, so that a resumed run must draw the same random numbers, and a text."""
    folder = tmp_path_factory.mktemp("given")
    write_fresh_model(folder / "model", Shape(layers=2, width=32, heads=2, vocabulary=257, longest=32), [""])
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> FinetuneSettings:
    return FinetuneSettings(
        model=str(folder / "model"),
        data=folder / "text.txt",
        output=tmp_path / "out",
        steps=5,
        batch_size=2,
        accumulate=2,
        sequence_length=32,
        learning_rate=1e-2,
        budget="96KiB",
        min_bytes="1KiB",
        device="cpu",
    )


def bits(report: FinetuneReport) -> tuple[list[float], str]:
    return report.losses, report.weights


@pytest.mark.usefixtures("nothing_left")
def test_spilled_kept_and_recomputed_activations_train_to_the_same_bits(settings: FinetuneSettings) -> None:
    spilled, kept, recomputed = (
        finetune(replace(settings, output=None, activations=way)) for way in ("spill", "keep", "recompute")
    )
    assert bits(spilled) == bits(kept) == bits(recomputed)
    assert len(set(spilled.losses)) == 5
    assert spilled.spill is not None
    assert spilled.spill.spilled_nbytes > 0
    assert spilled.spill.peak_nbytes <= 96 * 1024
    assert kept.spill is recomputed.spill is None


def test_the_result_is_what_transformers_opens(settings: FinetuneSettings) -> None:
    assert settings.output is not None
    report = finetune(settings)
    assert {path.name for path in settings.output.iterdir()} == {"model", "report.json"}
    trained = AutoModelForCausalLM.from_pretrained(settings.output / "model")
    given = AutoModelForCausalLM.from_pretrained(settings.model)
    assert not torch.equal(trained.lm_head.weight, given.lm_head.weight)
    assert AutoTokenizer.from_pretrained(settings.output / "model").decode([1]) != ""
    written = json.loads((settings.output / "report.json").read_text())
    assert FinetuneReport.from_dict(written) == report
    assert written["losses"][0] > written["losses"][-1]
    assert FinetuneSettings.from_dict(written["settings"]) == settings
    assert {"python", "torch", "transformers", "undercroft"} <= set(written["versions"])


def test_another_seed_sees_the_data_in_another_order(settings: FinetuneSettings) -> None:
    one, other = (finetune(replace(settings, output=None, seed=seed, steps=2)) for seed in (0, 1))
    assert one.losses != other.losses


def test_every_block_is_seen_once_an_epoch(settings: FinetuneSettings) -> None:
    seen: list[StepReport] = []
    report = finetune(
        replace(settings, output=None, steps=None, epochs=0.25, accumulate=1), on_step=seen.append
    )
    blocks = (len(TEXT.encode()) + 1) // 32
    assert report.steps == len(seen) == -(-int(blocks * 0.25) // 2)
    assert [step.step for step in seen] == list(range(1, report.steps + 1))
    assert report.left_out == (len(TEXT.encode()) + 1) % 32
    assert [step.loss for step in seen] == report.losses


# -- interrupted and resumed --------------------------------------------------------------------------------------


def interrupt_after(step: int) -> Callable[[StepReport], None]:
    """Ctrl-C, as the terminal sends it, while a step is reported."""

    def on_step(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_interrupted_and_resumed_is_the_same_as_in_one_go(lora: bool, settings: FinetuneSettings) -> None:
    if lora:
        pytest.importorskip("peft")
    assert settings.output is not None
    settings = replace(settings, lora=lora, rank=4)
    whole = finetune(replace(settings, output=None))
    with pytest.raises(Interrupted, match="interrupted after 2 steps") as caught:
        finetune(settings, on_step=interrupt_after(2))
    assert caught.value.checkpoint == settings.output / "checkpoint-00000002"
    assert [path.name for path in settings.output.iterdir()] == ["checkpoint-00000002"]
    with pytest.raises(Interrupted, match="interrupted after 3 steps"):
        finetune(replace(settings, resume=True, budget="80KiB"), on_step=interrupt_after(3))
    resumed = finetune(replace(settings, resume=True))
    assert bits(resumed) == bits(whole)
    assert resumed.steps == 5
    assert {path.name for path in settings.output.iterdir()} == {
        "adapter" if lora else "model",
        "report.json",
    }


def test_the_handler_of_ctrl_c_is_put_back(settings: FinetuneSettings) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        finetune(replace(settings, output=None), on_step=interrupt_after(1))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(settings: FinetuneSettings) -> None:
    def twice(report: StepReport) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(settings, on_step=twice)
    assert not isinstance(caught.value, Interrupted)
    assert settings.output is not None
    assert not settings.output.exists()


def saved(settings: FinetuneSettings) -> Path:
    """A checkpoint after two steps."""
    with pytest.raises(Interrupted) as caught:
        finetune(settings, on_step=interrupt_after(2))
    assert caught.value.checkpoint is not None
    return caught.value.checkpoint


def test_checkpoints_are_written_as_asked_and_the_newest_is_kept(settings: FinetuneSettings) -> None:
    assert settings.output is not None
    output, seen = settings.output, list[list[str]]()
    finetune(
        replace(settings, save_every=2),
        on_step=lambda _: seen.append(sorted(p.name for p in output.iterdir())),
    )
    assert seen == [[], [], ["checkpoint-00000002"], ["checkpoint-00000002"], ["checkpoint-00000004"]]


def test_a_checkpoint_holds_tensors_as_safetensors_and_the_rest_as_json(settings: FinetuneSettings) -> None:
    checkpoint = saved(settings)
    assert {path.name for path in checkpoint.iterdir()} == {
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    }
    weights, moments = (load_file(checkpoint / f"{name}.safetensors") for name in ("weights", "optimizer"))
    assert {f"exp_avg.{name}" for name in weights} < set(moments)
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], len(state["losses"])) == (2, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"learning_rate": 0.1}, "learning_rate = 0.01, not 0.1"),
        ({"steps": 9}, "steps = 5, not 9"),
        ({"sequence_length": 16}, "sequence_length = 32, not 16"),
    ],
)
def test_other_settings_cannot_go_on(change: dict[str, Any], told: str, settings: FinetuneSettings) -> None:
    saved(settings)
    with pytest.raises(InvalidInput, match=told):
        finetune(replace(settings, resume=True, **change))


def test_other_data_cannot_go_on(settings: FinetuneSettings, tmp_path: Path) -> None:
    saved(settings)
    (tmp_path / "other.txt").write_text("more" + TEXT)
    with pytest.raises(InvalidInput, match="the data changed"):
        finetune(replace(settings, resume=True, data=tmp_path / "other.txt"))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("state.json", "{", CorruptRecord),
        ("state.json", "[]", CorruptRecord),
        ("state.json", '{"format": 99}', WrongVersion),
        ("weights.safetensors", "half", CorruptRecord),
        ("optimizer.safetensors", "", CorruptRecord),
    ],
)
def test_a_damaged_checkpoint_is_said(
    name: str, content: str, error: type[UndercroftError], settings: FinetuneSettings
) -> None:
    (saved(settings) / name).write_text(content)
    with pytest.raises(error, match="checkpoint-00000002"):
        finetune(replace(settings, resume=True))


def test_what_a_killed_process_left_is_removed(settings: FinetuneSettings) -> None:
    assert settings.output is not None
    checkpoint = saved(settings)
    half = settings.output / ".partial-checkpoint-00000003"
    half.mkdir()
    (half / "weights.safetensors").write_text("half")
    finetune(replace(settings, resume=True))
    assert not half.exists()
    assert not checkpoint.exists()


def test_there_must_be_something_to_resume_and_nothing_to_overwrite(settings: FinetuneSettings) -> None:
    with pytest.raises(InvalidInput, match="there is no checkpoint in it"):
        finetune(replace(settings, resume=True))
    finetune(settings)
    with pytest.raises(InvalidInput, match="that run is finished"):
        finetune(replace(settings, resume=True))
    with pytest.raises(InvalidInput, match="is not empty; go on from it with --resume"):
        finetune(settings)


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"model": "/missing"}, InvalidInput, "there is no folder"),
        ({"data": Path("/missing")}, InvalidInput, "cannot read"),
        ({"data": Path("/dev/null")}, InvalidInput, "is empty"),
        ({"sequence_length": 64}, InvalidInput, "use --sequence-length 32 or less"),
        ({"learning_rate": 1e30}, InvalidInput, "training diverged"),
        ({"output": Path("/dev/null")}, InvalidInput, "is a file"),
        ({"output": Path("/proc/out")}, UnsafeDirectory, "cannot create"),
        ({"disks": (Path("/dev/null"),)}, UnsafeDirectory, "no directory"),
        ({"disk_capacity": "4KiB"}, TierFull, "name a directory with more room"),
        ({"write_cap": "4KiB"}, TierFull, "name a directory with more room"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore:spilling stopped")
@pytest.mark.usefixtures("nothing_left")
def test_an_error_says_what_to_do_and_leaves_nothing(
    change: dict[str, Any],
    error: type[UndercroftError],
    told: str,
    settings: FinetuneSettings,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=told):
        finetune(replace(settings, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_left")
def test_a_budget_too_small_names_one_that_works(settings: FinetuneSettings, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        finetune(replace(settings, budget="1KiB"))
    assert list(tmp_path.iterdir()) == []
    assert caught.value.least is not None
    assert finetune(replace(settings, budget=caught.value.least)).steps == 5


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    settings: FinetuneSettings, folder: Path, tmp_path: Path
) -> None:
    shape = Shape(layers=1, width=32, heads=2, vocabulary=300, longest=32)
    write_fresh_model(tmp_path / "model", shape, [TEXT])
    (tmp_path / "model" / "model.safetensors").write_bytes(
        (folder / "model" / "model.safetensors").read_bytes()
    )
    (tmp_path / "model" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="use the tokenizer that belongs to it"):
        finetune(replace(settings, model=str(tmp_path / "model")))


@pytest.mark.root
@pytest.mark.usefixtures("nothing_left")
def test_a_disk_too_small_for_a_checkpoint_leaves_the_one_before(
    settings: FinetuneSettings, mount: Mount
) -> None:
    output = mount("tmpfs", "size=800k,mode=700") / "out"
    with pytest.raises(TierFull, match="no room to write") as caught:
        finetune(replace(settings, output=output, save_every=1))
    assert "checkpoint-00000002" in str(caught.value)
    assert [path.name for path in output.iterdir()] == ["checkpoint-00000001"]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"accumulate": 0},
        {"steps": 0},
        {"epochs": 0.0},
        {"epochs": float("inf")},
        {"learning_rate": -1.0},
        {"sequence_length": 1},
        {"save_every": -1},
        {"warmup": -1},
        {"budget": "much"},
        {"min_bytes": "-1"},
        {"write_cap": "x"},
        {"output": None, "resume": True},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(
    change: dict[str, Any], settings: FinetuneSettings
) -> None:
    with pytest.raises(InvalidInput):
        replace(settings, **change)


# -- the learning rate --------------------------------------------------------------------------------------------


def test_the_learning_rate_climbs_then_falls_to_a_tenth() -> None:
    rates = [learning_rate_at(step, steps=100, peak=1.0, warmup=10) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate_at(0, steps=1, peak=1.0, warmup=0) == 1.0
