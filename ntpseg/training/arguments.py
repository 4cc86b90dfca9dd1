"""From a `RunConfig` to `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntpseg.training.argument_rules import OWN
from ntpseg.training.config import RunConfig
from ntpseg.training.config_file import reason
from ntpseg.training.distributed import deepspeed_config, prepare_deepspeed
from ntpseg.training.hardware import resolve_bf16

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What every run starts from; a configuration's `training:` section overrides it.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 20,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "bf16": "auto",
}

# What the Trainer needs because of how it is used here; a configuration that sets one is refused (`REFUSED`).
FIXED: dict[str, Any] = {
    "report_to": "none",  # our own callbacks know the run's folders
    "remove_unused_columns": False,  # sample_ids is not an argument of the model
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "ddp_find_unused_parameters": False,
    "logging_nan_inf_filter": False,  # it would log a loss of 0 in place of NaN
}


def training_arguments(config: RunConfig, run: Path) -> TrainingArguments:
    """Make the arguments; starts DeepSpeed's process group where one is wanted.

    Raises:
        ValueError: a field that the Trainer refuses, or an unusable DeepSpeed configuration.
    """
    from transformers import TrainingArguments

    own = {name: value for name, value in config.training.items() if name not in OWN}
    fields = {**DEFAULTS, **own, **FIXED, "output_dir": str(run), "seed": config.seed}
    if fields.get("fsdp"):
        # By default rank 0 would gather the whole model for each checkpoint.
        fields["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT", **(fields.get("fsdp_config") or {})}
    # YAML reads a bare `no` as False.
    fields |= {k: "no" for k, v in fields.items() if k.endswith("_strategy") and v is False}
    fields["bf16"] = resolve_bf16(fields["bf16"]) and not fields.get("fp16", False)
    # By the run's own measurement, see `ntpseg.training.compilation`.
    fields |= {"torch_compile": False} if fields.get("torch_compile") == "auto" else {}
    if not torch.cuda.is_available():
        fields |= {"use_cpu": True, "dataloader_pin_memory": False}
    zero = deepspeed_config(config.deepspeed)
    if zero is not None:
        prepare_deepspeed()
        fields["deepspeed"] = zero
    from ntpseg.training.argument_rules import installed_names

    try:
        args = TrainingArguments(**installed_names(fields))
        _try_schedule(args)
    except Exception as error:  # packages that are not there, hardware, and combinations that transformers refuses
        raise ValueError(f"training must be fields that TrainingArguments accepts, got: {reason(error)}") from error
    if args.n_gpu > 1:
        # One process with several GPUs would become DataParallel; use torchrun for more than one.
        args._n_gpu = 1
    return args


def _try_schedule(args: TrainingArguments) -> None:
    """Make the schedule once: the Trainer would find out about its arguments after everything is prepared."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kwargs: Any = args.lr_scheduler_kwargs
    get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=100, scheduler_specific_kwargs=kwargs
    )
