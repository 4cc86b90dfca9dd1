"""Models that are shared among ranks from the first weight on: ZeRO-3's partitions and FSDP2's shards.

The Trainer would take a model that every rank has built in full. Here each rank builds its shards alone (see
`ntpseg.models.sharded_init`) and hands them to DeepSpeed or FSDP2, module by module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ntpseg.models.sharded_init import SHARDS, WeightShards

if TYPE_CHECKING:
    from transformers import TrainingArguments


def shards_of_run(args: TrainingArguments | None) -> WeightShards | None:
    """What this rank keeps of the weights under ZeRO-3 and FSDP2; None where each rank has all of them.

    None as well where DeepSpeed keeps the weights on a disk, quantises them or shares them among fewer ranks (MiCS): it
    makes its own partitions then.

    Args:
        args: of the run; its process group has started.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.integrations.deepspeed import deepspeed_config

    if args is None or not dist.is_available() or not dist.is_initialized():
        return None
    if is_deepspeed_zero3_enabled():
        zero = deepspeed_config().get("zero_optimization", {})
        on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
        other = any(value for name, value in zero.items() if "quantized" in name or name == "mics_shard_size")
        return None if on_disk or other else WeightShards(dist.get_rank(), dist.get_world_size(), flat=True)
    if is_fsdp2(args):
        return WeightShards(dist.get_rank(), dist.get_world_size(), flat=False)
    return None


def is_fsdp2(args: TrainingArguments) -> bool:
    """Whether the arguments ask for FSDP2 over several ranks."""
    plugin = args.fsdp_plugin_args
    return plugin is not None and plugin.get("fsdp_version") == 2 and args.world_size > 1


@contextmanager
def without_zero_init() -> Iterator[None]:
    """A block in which transformers constructs models as if there were no ZeRO-3.

    It would partition a sub-model that is made from a configuration or read from files, and that one alone.
    """
    from transformers.integrations import deepspeed

    found = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = found


@torch.no_grad()
def partition_zero3(model: nn.Module) -> None:
    """Give the shards of a model from `build_sharded` to ZeRO-3 in place of its placeholders.

    `deepspeed.zero.Init` sees one module's weights at a time.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    shards: WeightShards = getattr(model, SHARDS)
    config = deepspeed_config()
    made: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        fresh = []
        for name, placeholder in module._parameters.items():
            if placeholder is None:
                continue
            if placeholder not in made:
                whole = torch.empty(placeholder.shape, dtype=placeholder.dtype)
                made[placeholder] = nn.Parameter(whole, placeholder.requires_grad)
                fresh.append(placeholder)
            module._parameters[name] = made[placeholder]
        if not fresh:
            continue
        deepspeed.zero.Init(nn.ParameterList(made[placeholder] for placeholder in fresh), config_dict_or_path=config)
        for placeholder in fresh:
            partition: Any = made[placeholder].ds_tensor  # type: ignore[attr-defined]  # DeepSpeed's
            shard = shards.of.pop(placeholder)
            partition.zero_()[: len(shard)].copy_(shard)
    delattr(model, SHARDS)


def shard_units(model: Any, *, reshard_after_forward: bool = True, **options: Any) -> None:
    """Divide a model into the units that FSDP2 gathers: every decoder layer, the embedding, the heads, all else.

    The heads and all else, with which backward begins, stay gathered after forward; so does an embedding that is tied
    to the heads, which is then of their unit. `ntpseg.cluster` counts memory and communication by these units.

    Args:
        model: an `NTPSegModel`.
        reshard_after_forward: of layers and embedding.
        **options: of ``torch.distributed.fsdp.fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard

    freed = {**options, "reshard_after_forward": reshard_after_forward}
    for layer in model.backbone.layers:
        fully_shard(layer, **freed)
    embedding = model.get_input_embeddings()
    if embedding.weight is model.heads.weight:
        fully_shard([embedding, model.heads], reshard_after_forward=False, **options)
    else:
        fully_shard(embedding, **freed)
        fully_shard(model.heads, reshard_after_forward=False, **options)
    fully_shard(model, **options)


@torch.no_grad()
def shard_fsdp2(model: Any, accelerator: Any) -> None:
    """Give the shards of a model from `build_sharded` to FSDP2 in place of its placeholders.

    Accelerate, which divides a model when the Trainer prepares it, leaves one alone that is divided already.

    Args:
        model: an `NTPSegModel`.
        accelerator: the Trainer's, whose policies the shards get, and whose device unless they are offloaded.
    """
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.tensor import DTensor

    shards: WeightShards = getattr(model, SHARDS)
    plugin, device = accelerator.state.fsdp_plugin, accelerator.device
    # Resolved before `fully_shard` renames the layers' class, by which accelerate would look for them.
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        # Around the layers and inside their shards, so that a layer is not gathered once more to be recomputed.
        fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False
    by_name = {name: shards.of[weight] for name, weight in model.named_parameters(remove_duplicate=False)}
    shards.of.clear()
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, OffloadPolicy) else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        # Accelerate has every module's results rounded, the loss among them, which its kernels give in float32.
        "mp_policy": dataclasses.replace(plugin.mixed_precision_policy or MixedPrecisionPolicy(), output_dtype=None),
        "offload_policy": offload,
    }
    shard_units(model, reshard_after_forward=bool(plugin.reshard_after_forward), **options)
    where = torch.device("cpu") if isinstance(offload, CPUOffloadPolicy) else device
    made: dict[Any, nn.Parameter] = {}
    state = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        shard = by_name.pop(name)
        if weight not in made:
            local = DTensor.from_local(
                shard.to(where),
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            made[weight] = nn.Parameter(local, weight.requires_grad)
        state[name.replace("_checkpoint_wrapped_module.", "")] = made[weight]
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    delattr(model, SHARDS)


def gather_fsdp2(model: nn.Module) -> dict[str, Any]:
    """The whole weights and buffers in rank 0's memory, gathered one at a time; all ranks must call it alike.

    Not ``Accelerator.get_state_dict``: accelerate knows of no FSDP2 on CPUs.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def start_fsdp2_on_cpu(accelerator: Any, args: TrainingArguments) -> None:
    """Have `accelerator` use FSDP2 on CPUs too, as the arguments say: it would train with DDP without a word."""
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    state = accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
