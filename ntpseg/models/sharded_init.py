"""A model built and loaded by ranks that each keep their shard of every weight, and never hold the whole.

While the model is constructed, each module's weights are drawn in full, cut to this rank's shard and replaced by
placeholders on the meta device as soon as the module has its place in the model. What is resident at any time is the
rank's shards and one module. The random numbers are those of a plain construction, one for one, so ranks that are
seeded alike make the very weights that one process makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ntpseg.models.loading_report import check_report
from ntpseg.models.sharded_files import WeightFiles
from ntpseg.utils.shares import even_share

# The attribute of a model whose weights are still apart from it.
SHARDS = "_weight_shards"


class WeightShards:
    """This rank's shards of a model's weights, by the placeholder that stands in the model.

    Args:
        rank, world_size: of the group that shares the weights.
        flat: a shard is a range of the flattened weight (ZeRO-3); False: of its first dimension (FSDP2's ``Shard(0)``).
            Either way the ranges have the ceiling of size / world_size entries, the last ones fewer.

    Attributes:
        of: shard ``[n]`` or ``[rows, ...]`` of each placeholder.
    """

    def __init__(self, rank: int, world_size: int, *, flat: bool) -> None:
        self.rank, self.world_size, self.flat = rank, world_size, flat
        self.of: dict[Tensor, Tensor] = {}
        self._placeholders: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def bounds(self, shape: Sequence[int]) -> tuple[int, int]:
        """First and last + 1 entry of the flattened weight of this shape, or row of it, that this rank keeps."""
        size = torch.Size(shape).numel() if self.flat else shape[0]
        return even_share(size, self.rank, self.world_size)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's shard of a weight, a copy."""
        start, stop = self.bounds(whole.shape)
        return (whole.detach().flatten() if self.flat else whole.detach())[start:stop].clone()

    def read(self, files: WeightFiles, name: str) -> Tensor:
        """This rank's shard of a weight in files; nothing else of it is read."""
        start, stop = self.bounds(files.shapes[name])
        return files.entries(name, start, stop) if self.flat else files.rows(name, start, stop)

    @torch.no_grad()
    def write_rows(self, weight: Tensor, first: int, rows: Tensor) -> None:
        """Set rows ``[n, D]`` of a weight ``[N, D]`` from row `first` on, of which this rank keeps those of its shard.

        Args:
            weight: the placeholder.
            first: row.
            rows: the same on every rank.
        """
        width = rows.shape[1] if self.flat else 1
        start, stop = self.bounds(weight.shape)
        low, high = max(start, first * width), min(stop, (first + len(rows)) * width)
        if low < high:
            source = rows.flatten() if self.flat else rows
            self.of[weight][low - start : high - start] = source[low - first * width : high - first * width].to(
                self.of[weight]
            )

    def replace(self, module: nn.Module) -> None:
        """Cut every weight of `module` that is still whole, and leave a placeholder in its place."""
        for owner in module.modules():
            for name, weight in owner._parameters.items():
                if weight is None or weight.is_meta:
                    continue
                if id(weight) not in self._placeholders:
                    placeholder = _empty(weight, "meta")
                    self.of[placeholder] = self.cut(weight)
                    # A weight that two modules share arrives twice, and its id must not be given to another before.
                    self._placeholders[id(weight)] = weight, placeholder
                owner._parameters[name] = self._placeholders[id(weight)][1]
        self._placeholders.clear()

    @contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """Inside the block the weights of `modules` (not of their children) are uninitialised ones of full size.

        After it each that was written to is cut and kept; of the others the shards stay. All ranks must write alike.
        """
        swapped: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter, int]] = []
        for module in modules:
            for name, weight in module._parameters.items():
                if weight is not None and weight in self.of:
                    full = _empty(weight, "cpu")
                    module._parameters[name] = full
                    swapped.append((module, name, weight, full, full._version))
        try:
            yield
        finally:
            for module, name, weight, full, version in swapped:
                module._parameters[name] = weight
                if full._version != version:
                    self.of[weight] = self.cut(full)

    def forget_unused(self, model: nn.Module) -> None:
        """Drop shards of weights that are not the model's (any more), such as of a matrix that was tied to another."""
        used = set(model.parameters())
        self.of = {weight: shard for weight, shard in self.of.items() if weight in used}


def _empty(weight: nn.Parameter, device: str) -> nn.Parameter:
    """An uninitialised weight in the place of another, with the marks that transformers has left on that."""
    made = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device), weight.requires_grad)
    made.__dict__.update(weight.__dict__)
    return made


@contextmanager
def _initialising(shards: WeightShards) -> Iterator[None]:
    """A block in which transformers initialises the weights of one module at a time, and each is cut at once."""
    initialise: Any = PreTrainedModel._initialize_weights

    def initialise_whole(model: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Some models' initialisers write to the weights of a module's children.
        with shards.whole(module, *(child for child in module.children() if not isinstance(child, PreTrainedModel))):
            initialise(model, module, *args, **kwargs)

    PreTrainedModel._initialize_weights = initialise_whole  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialise  # type: ignore[method-assign]


def build_sharded(make: Callable[[], PreTrainedModel], shards: WeightShards) -> Any:
    """The model that `make` constructs, its weights placeholders and `shards` its attribute `SHARDS`.

    Args:
        make: constructs the model, with the same random numbers on every rank.
        shards: takes the weights.
    """

    def placed(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            shards.replace(child)

    hook = register_module_module_registration_hook(placed)
    try:
        with _initialising(shards):
            model = make()
        shards.replace(model)
    finally:
        hook.remove()
    shards.forget_unused(model)
    setattr(model, SHARDS, shards)
    return model


def load_sharded(
    make: Callable[[], PreTrainedModel], shards: WeightShards, path: Path, *, optional: tuple[str, ...] = ()
) -> Any:
    """`build_sharded` with the weights of a saved model, of which each rank reads its shards alone.

    Args:
        make, shards: see `build_sharded`.
        path: directory of a saved model (safetensors), of the whole one or of its base model.
        optional: beginnings of names of weights that may be missing or superfluous, see `load_whole`.

    Raises:
        ValueError: as `load_whole`.
    """
    files = WeightFiles(path)
    start = torch.get_rng_state()
    # Those of the files are not drawn first.
    with no_init_weights():
        model = build_sharded(make, shards)
    model.tie_weights()
    shards.forget_unused(model)
    found = _sources(model, files)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    own = {name: tensor for name, tensor in (*parameters.items(), *model.named_buffers()) if name in found}
    missing = [name for name, source in found.items() if source is None and name in own]
    other: list[str] = []
    for name, tensor in own.items():
        source = found[name]
        if source is None:
            continue
        if files.shapes[source] != tuple(tensor.shape):
            other.append(name)
        elif name in parameters:
            shards.of[tensor] = shards.read(files, source).to(tensor.dtype)
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
        else:
            tensor.copy_(files.whole(source))
    # Releases of transformers before 4.32 saved the rotary tables.
    unexpected = [name for name in files.shapes if name not in found.values() and "rotary_emb.inv_freq" not in name]
    check_report(path, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": other}, optional)
    # `from_pretrained` draws what is missing and nothing else.
    torch.set_rng_state(start)
    if missing:
        for module in model.modules():
            module._is_hf_initialized = False
        with _initialising(shards):
            model.initialize_weights()
    return model


def _sources(model: Any, files: WeightFiles) -> dict[str, str | None]:
    """For each weight and buffer of a model's state the name that it has in files; None where it is not in them."""
    saved, prefix = list(model.state_dict()), f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in files.shapes):
        return {name: name if name in files.shapes else None for name in saved}
    # That of the base model alone, as in `from_pretrained`.
    base = {name: name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
    return {name: base[name] if base.get(name) in files.shapes else None for name in saved}
