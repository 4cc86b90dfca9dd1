"""Which fields of `transformers.TrainingArguments` a configuration may set, and what each may be.

Every field is in `ACCEPTED` or in `REFUSED`; one that is in neither, because transformers has added it since, is
refused too; the settings of `OWN` are no fields of that class. So nothing that a configuration says under ``training:``
is overridden or ignored in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ntpseg.utils.checks import check_choice, check_number

Check = Callable[[str, Any], None]

# What float32 and a 32-bit counter hold: beyond them PyTorch fails with an error that names no setting.
MAX_FLOAT = 3.4e38
MAX_INTEGER = 2**31 - 1


def integer(minimum: int, maximum: int = MAX_INTEGER) -> Check:
    """A check for an integer from `minimum` to `maximum`."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"{name} must be an integer >= {minimum} and <= {maximum}, got {shown(value)}")

    return check


def number(minimum: float | None = None, **limits: float) -> Check:
    """A check for a finite number of at least `minimum`; further limits as in `check_number`."""

    def check(name: str, value: Any) -> None:
        # Python's integers may be too large to become a float.
        if isinstance(value, int) and abs(value) > MAX_FLOAT:
            raise ValueError(f"{name} must be a number <= {MAX_FLOAT:g}, got {shown(value)}")
        check_number(name, value, minimum, **{"maximum": MAX_FLOAT, **limits})

    return check


def optional(check: Check) -> Check:
    """The same check, passed by null as well."""
    return lambda name, value: None if value is None else check(name, value)


def one_of(*kinds: type) -> Check:
    """A check for a value of one of these types."""
    wanted = " or ".join({bool: "true or false", str: "text", dict: "a mapping", list: "a list"}[k] for k in kinds)

    def check(name: str, value: Any) -> None:
        if type(value) not in kinds:
            raise ValueError(f"{name} must be {wanted}, got {shown(value)}")

    return check


def shown(value: Any) -> str:
    """``repr`` on one line and of readable length."""
    if isinstance(value, int) and value.bit_length() > 512:
        return f"an integer of {value.bit_length()} bits"  # `repr` refuses more than 4300 digits
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _member(enumeration: str) -> Check:
    def check(name: str, value: Any) -> None:
        from transformers import trainer_utils, training_args

        values = getattr(trainer_utils, enumeration, None) or getattr(training_args, enumeration)
        # YAML reads a bare `no` as False.
        check_choice(name, "no" if value is False else value, [str(entry.value) for entry in values])

    return check


def _auto_or_switch(name: str, value: Any) -> None:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"{name} must be auto, true or false, got {shown(value)}")


def _steps(name: str, value: Any) -> None:
    if value != -1 or isinstance(value, bool):
        integer(1)(name, value)


_switch, _text, _mapping = one_of(bool), one_of(str), optional(one_of(dict))
_fraction = number(0, below=1)
_positive = number(above=0)

ACCEPTED: dict[str, Check] = {
    "per_device_train_batch_size": integer(1),
    "per_device_eval_batch_size": integer(1),
    "gradient_accumulation_steps": integer(1),
    "num_train_epochs": number(above=0, maximum=MAX_INTEGER),
    "max_steps": _steps,
    "learning_rate": number(0),
    "lr_scheduler_type": _text,  # its names are checked by making the schedule
    "lr_scheduler_kwargs": _mapping,
    "warmup_steps": number(0, maximum=MAX_INTEGER),
    "optim": _member("OptimizerNames"),
    "optim_args": optional(_text),
    "optim_target_modules": optional(one_of(str, list)),
    "weight_decay": number(0),
    "adam_beta1": _fraction,
    "adam_beta2": _fraction,
    "adam_epsilon": number(0),
    "max_grad_norm": number(0),
    "bf16": _auto_or_switch,
    "fp16": _switch,
    "tf32": optional(_switch),
    "activation_checkpointing": optional(_switch),
    "activation_checkpointing_kwargs": _mapping,
    "gradient_checkpointing": optional(_switch),
    "gradient_checkpointing_kwargs": _mapping,
    "torch_compile": _auto_or_switch,
    "torch_compile_backend": optional(_text),
    "torch_compile_mode": optional(_text),
    "neftune_noise_alpha": optional(number(0)),
    "torch_empty_cache_steps": optional(integer(1)),
    "logging_strategy": _member("IntervalStrategy"),
    "logging_steps": number(above=0, maximum=MAX_INTEGER),
    "logging_first_step": _switch,
    "log_on_each_node": _switch,
    "log_level": _text,
    "log_level_replica": _text,
    "include_num_input_tokens_seen": one_of(bool, str),
    "eval_strategy": _member("IntervalStrategy"),
    "eval_steps": optional(number(above=0, maximum=MAX_INTEGER)),
    "eval_delay": number(0, maximum=MAX_INTEGER),
    "eval_on_start": _switch,
    "save_strategy": _member("SaveStrategy"),
    "save_steps": number(above=0, maximum=MAX_INTEGER),
    "save_total_limit": optional(integer(1)),
    "load_best_model_at_end": _switch,
    "metric_for_best_model": optional(_text),
    "greater_is_better": optional(_switch),
    "full_determinism": _switch,
    "use_cpu": _switch,
    "dataloader_num_workers": integer(0, 1024),
    "dataloader_pin_memory": _switch,
    "dataloader_prefetch_factor": optional(integer(1)),
    "dataloader_multiprocessing_context": optional(_text),
    "dataloader_in_order": _switch,
    "ddp_bucket_cap_mb": optional(integer(1)),
    "ddp_broadcast_buffers": optional(_switch),
    "ddp_static_graph": optional(_switch),
    "ddp_backend": optional(_text),
    "ddp_timeout": integer(1),
    "fsdp": optional(one_of(str, bool, list)),
    "fsdp_config": _mapping,
    "debug": one_of(str, list),
    "skip_memory_metrics": _switch,
}

# Settings of the section that are ours and no fields of TrainingArguments.
OWN: dict[str, Check] = {
    "profile_steps": integer(0),  # see `ntpseg.training.profiling`
    "hang_timeout": optional(number(0)),  # see `ntpseg.training.hang`
    "sequence_parallel_size": integer(1),  # see `ntpseg.models.sequence_parallel`
}

_LOGS = "logs go to OUTPUT/logs (TensorBoard) and OUTPUT/trainer_log.jsonl; import those into other loggers"
_HUB = "a run uploads nothing; use `ntpseg pack` and upload its file"
_SCORES = "evaluation scores are computed here, without gathering predictions; `ntpseg eval` scores masks"
_ORDER = "every epoch is a permutation drawn from `seed`, so that a resumed run sees the same batches"
_LIGER = "the model's own kernels are used; attention is chosen by model.attention"
_RESUME = "a resumed run must be the one that was interrupted"
_FULL = "an evaluation while training computes as training does; `ntpseg eval --dtype` chooses"
_PROGRAM = "`ntpseg train` always trains and evaluates by eval_strategy; use `ntpseg eval` and `ntpseg predict`"

# Why a field must not be set, and what to use instead.
REFUSED: dict[str, str] = {
    "output_dir": "use output",
    "deepspeed": "use deepspeed, outside of training",
    "seed": "use seed, outside of training",
    "data_seed": "use seed, outside of training",
    "resume_from_checkpoint": "use `ntpseg train --resume`",
    "local_rank": "start several processes with torchrun",
    "average_tokens_across_devices": "each loss is always divided by the counts of all ranks",
    "label_smoothing_factor": "the loss is that of the section loss, which has no label smoothing",
    "bf16_full_eval": _FULL,
    "fp16_full_eval": _FULL,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "training keeps no cache of keys and values",
    "auto_find_batch_size": "the batch would not be the configuration's; use per_device_train_batch_size",
    "logging_nan_inf_filter": "losses that are not finite are always logged as they are",
    "disable_tqdm": "the bar is this program's; send standard error to a file to be without it",
    "report_to": _LOGS,
    "run_name": _LOGS,
    "project": _LOGS,
    "trackio_space_id": _LOGS,
    "trackio_bucket_id": _LOGS,
    "trackio_static_space_id": _LOGS,
    "prediction_loss_only": _SCORES,
    "eval_do_concat_batches": _SCORES,
    "eval_use_gather_object": _SCORES,
    "eval_accumulation_steps": _SCORES,
    "include_for_metrics": _SCORES,
    "batch_eval_metrics": _SCORES,
    "save_only_model": "checkpoints are for --resume; the model alone is OUTPUT/model",
    "save_on_each_node": "all nodes must share the folder of output",
    "enable_jit_checkpoint": "it would save in the middle of a step; use save_strategy=steps and save_steps",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "accelerator_config": "how batches are divided between ranks is fixed, or ranks would change the result",
    "parallelism_config": "use deepspeed or training.fsdp",
    "dataloader_drop_last": "the last batch counts by its size, and fewer pairs than a batch would train nothing",
    "dataloader_persistent_workers": "workers that outlive an epoch would repeat its augmentation",
    "remove_unused_columns": "the model's inputs are chosen here",
    "label_names": "the model's inputs are chosen here",
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "ddp_find_unused_parameters": "every parameter gets a gradient, so there is none to find",
    "do_train": _PROGRAM,
    "do_eval": _PROGRAM,
    "do_predict": _PROGRAM,
}

# Fields of earlier releases, which people still write.
_FORMER = {
    "logging_dir": _LOGS,
    "group_by_length": _ORDER,
    "evaluation_strategy": "use training.eval_strategy",
    "warmup_ratio": "use training.warmup_steps, below 1 a fraction of all steps",
    "no_cuda": "use training.use_cpu",
    "overwrite_output_dir": "use `ntpseg train --overwrite`",
    "push_to_hub_token": _HUB,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_organization": _HUB,
    "tpu_num_cores": "there is no TPU backend",
    "jit_mode_eval": _FULL,
    "save_safetensors": "models are always saved as safetensors",
    "per_gpu_train_batch_size": "use training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use training.per_device_eval_batch_size",
}


# Newer names of fields, by which those are known here whatever release is installed.
_ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}

# Fields of a run's configuration that are easily looked for in this section.
_ELSEWHERE = ("max_minutes", "max_skipped_steps", "clock", "output")


def check_training(fields: Mapping[Any, Any]) -> None:
    """Check the names and values of a configuration's ``training`` section.

    Raises:
        ValueError: a field that is overridden or ignored here, that transformers does not have, or whose value is of
            the wrong kind or out of range.
    """
    known, release = _fields()
    for name, value in fields.items():
        if name in OWN:
            OWN[name](f"training.{name}", value)
            continue
        why = REFUSED.get(name) if name in known else _FORMER.get(name)
        if why is not None:
            got = "a value" if "token" in name else shown(value)  # a token of the hub is a secret
            raise ValueError(f"training.{name} must not be set ({why}), got {got}")
        if name not in known:
            if name in _ELSEWHERE:
                raise ValueError(
                    f"training.{name} must not be set (it stands outside of training: {name}=...), got {shown(value)}"
                )
            near = difflib.get_close_matches(str(name), [*ACCEPTED, *OWN], 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"training must hold fields of transformers.TrainingArguments, got {shown(name)}{hint}")
        if name not in ACCEPTED:
            raise ValueError(
                f"training.{name} must not be set (it is new in transformers {release} and has no "
                f"effect that this version of ntpseg knows), got {shown(value)}"
            )
        ACCEPTED[name](f"training.{name}", value)


def installed_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under the names that the installed transformers has for them."""
    known = _own_fields()
    return {_ALIASES.get(name, name) if name not in known else name: value for name, value in fields.items()}


def _fields() -> tuple[list[str], str]:
    """The names of the fields that can be given to the installed transformers, and its release."""
    import transformers

    own = _own_fields()
    return [*own, *(name for name, former in _ALIASES.items() if former in own)], transformers.__version__


def _own_fields() -> list[str]:
    import dataclasses

    import transformers

    return [field.name for field in dataclasses.fields(transformers.TrainingArguments)]


def check_combinations(fields: Mapping[str, Any], *, max_minutes: float | None, optimizer: str, ema: float) -> None:
    """Refuse fields that another setting of the run would override.

    Raises:
        ValueError: such a field is set.
    """
    if max_minutes is not None:
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
            if fields.get(name) is not None:
                raise ValueError(
                    f"training.{name} must not be set with max_minutes, whose schedule follows the clock, "
                    f"got {shown(fields[name])}"
                )
    if optimizer == "muon":
        for name in ("optim", "optim_args", "optim_target_modules"):
            if fields.get(name) is not None:
                raise ValueError(f"training.{name} must not be set with optimizer.name=muon, got {shown(fields[name])}")
    for name, former in _ALIASES.items():
        if fields.get(name) is not None and fields.get(former) is not None:
            raise ValueError(
                f"training.{former} must not be set with training.{name}, its newer name, got {shown(fields[former])}"
            )
    if fields.get("bf16") is True and fields.get("fp16"):
        raise ValueError("training.fp16 must be false with training.bf16=true, got true")
    version = (fields.get("fsdp_config") or {}).get("version", 2)
    if fields.get("fsdp") and ema and str(version) != "2":
        raise ValueError(
            "training.fsdp_config.version must be 2 with optimizer.ema, of which each rank averages its part, "
            f"got {shown(version)}"
        )
    if fields.get("load_best_model_at_end") and ema:
        raise ValueError(
            "training.load_best_model_at_end must be false with optimizer.ema, whose averaged weights are saved, "
            "got true"
        )
