"""transformers' Trainer with its activations on disk: one callback, and the same numbers."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import undercroft as uc

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
)


def train(*callbacks: uc.SpillCallback) -> list[float]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    rows = torch.randint(512, (16, 128), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    plain = train()
    callback = uc.SpillCallback(budget="4MiB", min_bytes="64KiB")
    spilled = train(callback)
    print(callback.report)
    print("losses are the same, bit for bit:", plain == spilled)
    assert plain == spilled


if __name__ == "__main__":
    main()
