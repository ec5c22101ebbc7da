"""SpillCallback inside transformers' Trainer: the same numbers, and nothing left behind whatever happens."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from undercroft import (
    ActivationSpill,
    BudgetExceeded,
    InvalidInput,
    SpillCallback,
    SpillMisuse,
    UnsafeDirectory,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(peft|trl|transformers|accelerate).*"),
]


def spilling(**options: Any) -> SpillCallback:
    return SpillCallback(**{"budget": "48KiB", "min_bytes": "1KiB", **options})


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=0.1,  # so that the order in which random numbers are drawn matters
        )
    )


def tokens() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(64, (12, 32), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def tiny_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    model: torch.nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    settings = TrainingArguments(
        str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **arguments,
        },
    )
    return kind(
        model or tiny_model(),
        settings,
        train_dataset=tokens(),
        eval_dataset=tokens()[:4],
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer: Trainer) -> Trainer:
    """The trainer after training; the next must be made after that, for a new one seeds the random generators."""
    trainer.train()
    return trainer


def assert_equal(trainer: Trainer, plain: Trainer) -> None:
    assert losses(trainer) == losses(plain)
    assert len(losses(plain)) == 3
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def assert_nothing_left(trainer: Trainer, threads: Sequence[threading.Thread]) -> None:
    assert "training_step" not in vars(trainer)
    assert threading.enumerate() == list(threads)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"gradient_checkpointing": True},
    ],
    ids=["plain", "accumulation", "evaluation", "checkpointing"],
)
def test_losses_and_weights_are_those_of_a_plain_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    callback, threads = spilling(), threading.enumerate()
    trainer = trained(tiny_trainer(tmp_path, callback, **arguments))
    plain = trained(tiny_trainer(tmp_path, **arguments))
    assert_equal(trainer, plain)
    assert_nothing_left(trainer, threads)
    assert callback.report is not None
    assert callback.report.spilled_nbytes > 0
    assert callback.report.peak_nbytes <= callback.report.budget == 48 * 1024
    assert callback.report.steps == 3 * arguments.get("gradient_accumulation_steps", 1)


def test_an_adapter_of_peft_trains_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def with_adapter() -> torch.nn.Module:
        model = tiny_model()
        shape = peft.LoraConfig(
            r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, shape)

    callback = spilling()
    trainer = trained(tiny_trainer(tmp_path, callback, model=with_adapter()))
    plain = trained(tiny_trainer(tmp_path, model=with_adapter()))
    assert_equal(trainer, plain)
    assert callback.report is not None
    assert callback.report.spilled_nbytes > 0


def test_trl_trains_the_same(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from undercroft.models.fresh import Shape, write_fresh_model

    shape = Shape(layers=1, width=32, heads=2, vocabulary=257, longest=64)
    write_fresh_model(tmp_path / "model", shape, [""])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def sft(*callbacks: TrainerCallback) -> Trainer:
        return trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
            trl.SFTConfig(
                str(tmp_path / "out"),
                max_steps=3,
                per_device_train_batch_size=2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=datasets.Dataset.from_dict({"text": ["the cat sat on the mat " * 3] * 8}),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "model", pad_token="<end>"),
            callbacks=list(callbacks),
        )

    callback = spilling()
    trainer, plain = trained(sft(callback)), trained(sft())
    assert_equal(trainer, plain)
    assert callback.report is not None
    assert callback.report.spilled_nbytes > 0


def test_the_report_stays_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = spilling()
    assert callback.report is None
    with caplog.at_level(logging.INFO, "undercroft.training.trainer"):
        tiny_trainer(tmp_path, callback).train()
    assert str(callback.report) in caplog.text


def test_it_serves_one_run_after_another(tmp_path: Path) -> None:
    callback = spilling()
    for _ in range(2):
        tiny_trainer(tmp_path, callback).train()
        assert callback.report is not None
        assert callback.report.steps == 3


class FailingLoss(Trainer):
    """Fails in the second step, after forward."""

    failure: BaseException

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 1:
            raise self.failure
        return loss


@pytest.mark.parametrize("failure", [ZeroDivisionError("broken"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_step_leaves_nothing_active(failure: BaseException, tmp_path: Path) -> None:
    callback, threads = spilling(), threading.enumerate()
    trainer = tiny_trainer(tmp_path, callback, kind=FailingLoss)
    trainer.failure = failure
    with pytest.raises(type(failure)):
        trainer.train()
    assert_nothing_left(trainer, threads)
    assert callback.report is not None
    assert callback.report.steps >= 1
    with ActivationSpill(
        directory=tmp_path / "spill"
    ) as spill:  # would be refused were the other still active
        spill.close()


def test_an_error_between_steps_is_no_obstacle_to_the_next_run(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        fails = True

        def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
            if self.fails:
                raise ZeroDivisionError

    callback, failing, threads = spilling(), Failing(), threading.enumerate()
    trainer = tiny_trainer(tmp_path, callback, failing)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    failing.fails = False
    trainer.train()
    assert_nothing_left(trainer, threads)


def test_a_budget_too_small_names_one_that_works(tmp_path: Path) -> None:
    threads = threading.enumerate()
    trainer = tiny_trainer(tmp_path, spilling(budget="1KiB"))
    with pytest.raises(BudgetExceeded) as caught:
        trainer.train()
    assert_nothing_left(trainer, threads)
    assert caught.value.least is not None
    tiny_trainer(tmp_path, spilling(budget=caught.value.least)).train()


def test_sizes_are_checked_at_once_and_the_directory_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a size"):
        SpillCallback(budget="2 gigs")
    with pytest.raises(InvalidInput, match="more than 0"):
        SpillCallback(budget=0)
    (tmp_path / "file").write_text("")
    trainer = tiny_trainer(tmp_path, spilling(directory=tmp_path / "file"))
    with pytest.raises(UnsafeDirectory):
        trainer.train()


def test_a_trainer_with_a_loop_of_its_own_is_refused(tmp_path: Path) -> None:
    class OwnLoop(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> None:
            self.callback_handler.on_train_begin(self.args, self.state, self.control)
            self.callback_handler.on_step_end(self.args, self.state, self.control)

    threads = threading.enumerate()
    trainer = tiny_trainer(tmp_path, spilling(), kind=OwnLoop)
    with pytest.raises(SpillMisuse, match="OwnLoop has a training loop of its own"):
        trainer.train()
    assert_nothing_left(trainer, threads)


def test_outside_a_trainer_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpillMisuse, match="was not called by a Trainer"):
        spilling().on_train_begin(
            TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=tiny_model()
        )
