"""A Hugging Face causal language model under Trainer, made to train without logits by one call.

    python examples/causal_lm.py [--model qwen2|qwen3|llama|emu3] [--steps 12]

The model is small and random, its vocabulary is not. To see the curves agree, TCL and HET are off (``negatives=0``, no
hard tokens): then ours is the cross-entropy that the model computes itself.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from compare import compare
from torch.utils.data import Dataset
from transformers import (
    Emu3ForCausalLM,
    Emu3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ntpseg.losses.huggingface import fuse_causal_lm

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "emu3": (Emu3TextConfig, Emu3ForCausalLM),
}


class Patterns(Dataset):
    """Rows of one repeated number with a prompt that is not supervised: learnable within a few steps."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, vocabulary, (rows, 1), generator=generator).expand(rows, length).contiguous()
        self.ids[:, ::7] = 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: len(labels) // 4] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def build(name: str, vocabulary: int, width: int) -> PreTrainedModel:
    """A two-layer model of the family, the same at every call."""
    set_seed(0)
    config, model = FAMILIES[name]
    sizes = config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return model(sizes)


def train(model: PreTrainedModel, data: Dataset, steps: int) -> list[float]:
    """The losses of a Trainer run with gradient accumulation."""
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, training, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(FAMILIES), default="qwen2")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(arguments)
    data = Patterns(64, args.length, args.vocabulary)
    sizes = (args.model, args.vocabulary, args.width)
    return compare(
        lambda: train(build(*sizes), data, args.steps),
        lambda: train(fuse_causal_lm(build(*sizes), negatives=0), data, args.steps),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


if __name__ == "__main__":
    main()
