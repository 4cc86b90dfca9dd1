"""A checkpoint resumed under another number of ranks or another kind of sharding.

Between the two lies a folder in DeepSpeed's universal format: for each parameter a folder of its name with ``fp32.pt``,
``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``. DeepSpeed's own tools write it of ZeRO checkpoints and read it under
any stage and number of ranks; those of one process, DDP and FSDP2 are written and read here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ntpseg.training.parallelism import Parallelism
from ntpseg.utils.files import TEMPORARY_FOLDER

if TYPE_CHECKING:
    from ntpseg.training.checkpointing import CheckpointTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")
# Of ZeRO's state, beside what is kept by parameter name.
_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
_CURE = "resume under the ranks and the stage that wrote it, or start again with --overwrite"


def needed(saved: Parallelism, now: Parallelism) -> bool:
    """Whether the optimizer's state has to change its form; FSDP2 and DDP divide their own anew."""
    if saved.kind == now.kind:
        return now.kind.startswith("zero") and now.sharded and saved.ranks != now.ranks
    return True


class Resharding:
    """A checkpoint on its way into a trainer that is divided otherwise; made before the model is, used after.

    Args:
        trainer: takes it; its model and optimizer are not divided yet.
        checkpoint, saved: of the checkpoint.
        now: of the trainer.

    Raises:
        ValueError: it cannot be converted; one line says why, and what can be done.
    """

    def __init__(self, trainer: CheckpointTrainer, checkpoint: Path, saved: Parallelism, now: Parallelism) -> None:
        _check(trainer, checkpoint, saved, now)
        self.trainer, self.checkpoint, self.saved = trainer, checkpoint, saved
        model: Any = trainer.model
        self.model, self.order = model, parameter_order(trainer)
        with tempfile.TemporaryDirectory(dir=_home(checkpoint), prefix=TEMPORARY_FOLDER) as folder:
            trainer._issue_warnings_after_load(load_module(model, checkpoint, saved, Path(folder)))
        if trainer.is_world_process_zero():
            print(f"{checkpoint.name} is of {saved}, and goes on under {now}", file=sys.stderr)

    def load(self) -> None:
        """Give optimizer, weights and schedule what the checkpoint has; all ranks call it alike.

        Raises:
            ValueError: the checkpoint's optimizer state is not that of AdamW, or of another model; on all ranks.
        """
        trainer = self.trainer
        # A name that the next start removes, should this one be killed; the same on all ranks.
        home = _home(self.checkpoint) / f"{TEMPORARY_FOLDER}{self.checkpoint.name}"
        folder = home / "universal"  # beside which DeepSpeed writes a file of its own
        problem: list[str | None] = [None]
        if trainer.is_world_process_zero():
            shutil.rmtree(home, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                write_universal(self.checkpoint, self.saved, folder, self.model, self.order)
            except ValueError as error:
                problem = [str(error)]
        if trainer.args.world_size > 1:
            dist.broadcast_object_list(problem, 0)
        if problem[0] is not None:
            raise ValueError(problem[0])
        load_universal(trainer, folder)
        load_schedule(trainer, self.checkpoint)
        trainer.wait_for_ranks()
        if trainer.is_world_process_zero():
            shutil.rmtree(home, ignore_errors=True)


def load_module(model: nn.Module, checkpoint: Path, saved: Parallelism, folder: Path) -> Any:
    """Give a model that is not divided yet the weights and buffers of a checkpoint.

    Args:
        model: takes them.
        checkpoint, saved: of the checkpoint.
        folder: for temporary files.

    Returns:
        What ``model.load_state_dict`` returns; nothing is missing of a ZeRO-3 checkpoint without gathered weights.
    """
    state = _saved_weights(checkpoint, saved, folder)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not state and (other := sorted(set(model.state_dict()) - trained)):
        raise ValueError(
            f"checkpoint must hold {other[0]!r} beside the optimizer's state, got none in {checkpoint}, which was "
            f"saved without stage3_gather_16bit_weights_on_model_save; {_CURE}"
        )
    # What is divided already gets its part with the optimizer's state.
    divided = {n for n, p in model.named_parameters() if hasattr(p, "ds_id") or p.is_meta or isinstance(p, DTensor)}
    own = model.state_dict()
    for name in sorted(set(state) & set(own)):
        shape = tuple(own[name].shape)
        if name not in divided and tuple(state[name].shape) != shape:
            raise ValueError(
                f"checkpoint must hold the weights of this model, got one whose {name!r} is "
                f"{list(state[name].shape)} instead of {list(shape)}"
            )
    result: Any = model.load_state_dict({k: v for k, v in state.items() if k not in divided}, strict=False)
    if not state or divided:
        result.missing_keys.clear()
    return result


def parameter_order(trainer: CheckpointTrainer) -> list[list[str]]:
    """Names of the parameters of each of the optimizer's groups, in the order of its state."""
    model: Any = trainer.model
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return [[name for name in trained if (name in decayed) is wanted] for wanted in (True, False)]


def write_universal(
    checkpoint: Path, saved: Parallelism, folder: Path, model: nn.Module, order: list[list[str]]
) -> None:
    """Write the optimizer's state of a checkpoint into a folder in the universal format.

    Args:
        checkpoint, saved: of the checkpoint.
        folder: empty.
        model: whose parameters it is.
        order: see `parameter_order`.

    Raises:
        ValueError: the state is not that of AdamW, or of another model.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    try:
        if saved.kind.startswith("zero"):
            step, scale = _unpack_zero(checkpoint, folder, shapes)
        else:
            states = _fsdp_states(checkpoint, folder) if saved.kind == "fsdp" else _plain_states(checkpoint, order)
            steps = [float(state["step"]) for state in states.values()]
            step, scale = torch.tensor(max(steps)), {}
            weights = dict(_weights(checkpoint, folder, saved, model))
            for name, shape in shapes.items():
                blank = torch.zeros(shape)
                _write(folder, name, "fp32", weights[name], shape)
                for key in MOMENTS:
                    _write(folder, name, key, states.get(name, {}).get(key, blank), shape)
    except (KeyError, IndexError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            "checkpoint must hold AdamW's state of this model to be resumed under another division, got "
            f"{str(checkpoint)!r} ({type(error).__name__}: {reason}); {_CURE}"
        ) from error
    for name in shapes:
        torch.save(step, folder / "zero" / name / "step.pt")
    torch.save({"step": step, **scale}, folder / "zero" / "optimizer_state.pt")


def load_universal(trainer: CheckpointTrainer, folder: Path) -> None:
    """Give the trainer's divided model and its optimizer what `write_universal` wrote; all ranks call it alike."""
    if trainer.is_deepspeed_enabled:
        _load_zero(trainer, folder)
        return
    wrapped: Any = trainer.optimizer
    optimizer = getattr(wrapped, "optimizer", wrapped)
    step = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True)["step"]
    model: Any = trainer.model
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        values = {key: _like(parameter, _read(folder, names[id(parameter)], key)) for key in ("fp32", *MOMENTS)}
        with torch.no_grad():
            parameter.copy_(values.pop("fp32"))
        state[index] = {"step": step.to(torch.float32).clone(), **values}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_schedule(trainer: CheckpointTrainer, checkpoint: Path) -> None:
    """The schedule goes on, and the optimizer has its learning rate."""
    scheduler: Any = trainer.lr_scheduler
    scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", map_location="cpu", weights_only=True))
    for group, rate in zip(cast(Any, trainer.optimizer).param_groups, scheduler.get_last_lr()):
        group["lr"] = rate


def write_random_state(checkpoint: Path, saved: Parallelism, rank: int, now: Parallelism, folder: Path) -> None:
    """Write the random state of a rank into a folder, under the name that the Trainer has for this number of ranks.

    It is that of the saved rank with the same data-parallel rank d, ``d % saved.data_parallel_size`` where there was
    none: ranks that share sequences have one state.
    """
    ranks = now.ranks
    former = rank // now.sequence_parallel_size % saved.data_parallel_size * saved.sequence_parallel_size
    source = checkpoint / ("rng_state.pth" if saved.ranks == 1 else f"rng_state_{former}.pth")
    state = torch.load(source, weights_only=True)
    # Of several ranks each sees all devices of its host, and the Trainer keeps them all.
    if "cuda" in state and ranks > 1 and isinstance(state["cuda"], Tensor):
        state["cuda"] = [state["cuda"]] * torch.cuda.device_count()
    elif "cuda" in state and ranks == 1 and not isinstance(state["cuda"], Tensor):
        state["cuda"] = state["cuda"][rank % len(state["cuda"])]
    torch.save(state, folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))


def _home(checkpoint: Path) -> Path:
    """Where temporary files go: large ones, which all ranks must see."""
    return checkpoint.parent


def _check(trainer: CheckpointTrainer, checkpoint: Path, saved: Parallelism, now: Parallelism) -> None:
    """Refuse a conversion that cannot be done, in one line.

    Raises:
        ValueError: it says what can be.
    """
    muon = trainer.optimizer_options.name == "muon"
    optimizer = "muon" if muon else str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise _refused(checkpoint, saved, now, f"only the state of AdamW can be converted, not that of {optimizer}")
    for side in (saved, now):
        if side.kind == "zero0":
            raise _refused(checkpoint, saved, now, "that of DeepSpeed's stage 0 cannot be converted")
    if now.kind == "fsdp" and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise _refused(checkpoint, saved, now, "under FSDP only version 2 can take it (training.fsdp_config.version=2)")
    if trainer.args.fp16 and not (saved.kind.startswith("zero") and now.kind.startswith("zero")):
        raise _refused(
            checkpoint, saved, now, "the loss scale of fp16 cannot be converted; that of bf16 and float32 can"
        )
    if not (checkpoint / "scheduler.pt").is_file():
        raise _refused(checkpoint, saved, now, "a scheduler of DeepSpeed's own JSON file cannot be converted")
    if saved.kind.startswith("zero"):
        try:
            import deepspeed  # noqa: F401  # only to see that it is there
        except ImportError as error:
            raise _refused(checkpoint, saved, now, "the package deepspeed must be installed to read it") from error


def _refused(checkpoint: Path, saved: Parallelism, now: Parallelism, why: str) -> ValueError:
    return ValueError(f"{checkpoint} of {saved} cannot be resumed by {now}: {why}; {_CURE}")


def _write(folder: Path, name: str, key: str, value: Tensor, shape: Sequence[int]) -> None:
    path = folder / "zero" / name
    path.mkdir(parents=True, exist_ok=True)
    torch.save({"param": value.detach().float().reshape(tuple(shape)).contiguous(), "cat_dim": 0}, path / f"{key}.pt")


def _read(folder: Path, name: str, key: str) -> Tensor:
    return torch.load(folder / "zero" / name / f"{key}.pt", weights_only=True, mmap=True)["param"]


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every rank has read all of it, so none has to send.
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.clone()


def _plain_states(checkpoint: Path, order: list[list[str]]) -> dict[str, dict[str, Tensor]]:
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    groups = [group["params"] for group in saved["param_groups"]]
    if [len(group) for group in groups] != [len(group) for group in order]:
        raise KeyError("the groups of its optimizer are of other sizes")
    names = {index: name for group, own in zip(groups, order) for index, name in zip(group, own)}
    return {names[index]: state for index, state in saved["state"].items()}


def _fsdp_states(checkpoint: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    return dict(_dcp(checkpoint, "optimizer", "optimizer", folder)["state"])


def _weights(checkpoint: Path, folder: Path, saved: Parallelism, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by name; those that share one tensor are in a file under one of their names alone."""
    state = _saved_weights(checkpoint, saved, folder)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for group in aliases.values():
        held = next((name for name in group if name in state), None)
        if held is not None:
            yield from ((name, state[held]) for name in group)


def _saved_weights(checkpoint: Path, saved: Parallelism, folder: Path) -> dict[str, Tensor]:
    """Weights and buffers by name: those in whole files, or in FSDP's shards; empty where ZeRO-3 gathered none."""
    state: dict[str, Tensor] = {}
    for part in sorted(checkpoint.glob("model*.safetensors")):
        state |= load_file(part)
    if not state and saved.kind == "fsdp":
        state = _dcp(checkpoint, "pytorch_model_fsdp", "model", folder)
    return state


def _dcp(checkpoint: Path, name: str, key: str, folder: Path) -> Any:
    """What FSDP saved under a name: a sharded checkpoint, or one file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if (whole := checkpoint / f"{name}.bin").is_file():
        state = torch.load(whole, map_location="cpu", weights_only=True)
        return state.get(key, state)
    joined = folder / f"{name}.joined.pt"
    if not joined.is_file():
        joined.parent.mkdir(parents=True, exist_ok=True)
        dcp_to_torch_save(checkpoint / f"{name}_0", joined)
    return torch.load(joined, map_location="cpu", weights_only=True, mmap=True)[key]


def _unpack_zero(checkpoint: Path, folder: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[Tensor, dict[str, Any]]:
    """Have DeepSpeed write its universal checkpoint; Adam's step, and the state of the loss scale."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    options = argparse.Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(folder),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    common = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=True)
    steps = [torch.load(path, weights_only=True) for path in sorted((folder / "zero").glob("*/step.pt"))]
    if not steps:
        steps = [state["step"] for state in common["optimizer_state_dict"]["state"].values()]
    for name, shape in shapes.items():
        for key in ("fp32", *MOMENTS):
            path = folder / "zero" / name / f"{key}.pt"
            value = torch.load(path, map_location="cpu", weights_only=True)
            # Of stage 3 the files hold vectors, which stages 1 and 2 do not read.
            if not isinstance(value, dict):
                _write(folder, name, key, value, shape)
    return torch.as_tensor(steps[0]).float().cpu(), {name: common[name] for name in _SCALE if name in common}


def _load_zero(trainer: CheckpointTrainer, folder: Path) -> None:
    import deepspeed

    engine: Any = trainer.model_wrapped
    zero: Any = engine.optimizer
    path = folder / "zero" / "optimizer_state.pt"
    if trainer.is_world_process_zero():
        common = torch.load(path, weights_only=True)
        groups: list[dict[str, Any]] = [{} for _ in zero.optimizer.param_groups]
        step = common.pop("step")
        # Where the two stages look for what they want. No group's settings are among it: stage 3 would give those of
        # the first group, weight decay included, to all.
        state = {"state": {0: {"step": step}}, "param_groups": [{}]}
        common |= {"ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": state}
        torch.save(common, path)
    trainer.wait_for_ranks()
    divided = int(trainer.accelerator.state.deepspeed_plugin.zero_stage) == 3
    if divided:
        zero.checkpoint_event_prologue()
    zero.load_state_dict(
        state_dict_list=None,
        load_optimizer_states=True,
        load_from_fp32_weights=False,
        checkpoint_folder=str(folder),
    )
    if divided:
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()
    engine.global_steps = trainer.state.global_step
    engine.global_samples = trainer.state.global_step * engine.train_batch_size()
