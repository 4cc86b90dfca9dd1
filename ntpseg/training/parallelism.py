"""How a run is divided among processes, kept with each checkpoint, and how its global batch stays what it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from ntpseg.training.steps import StepTrainer

_FILE = "parallelism.json"


@dataclass(frozen=True)
class Parallelism:
    """The division of a run.

    Attributes:
        kind: ``plain`` (one process or DDP), ``zero0`` to ``zero3`` (DeepSpeed's stage) or ``fsdp``.
        ranks: number of processes.
        batch: pairs per rank and micro-batch; 0 where a checkpoint of an earlier release does not say.
        accumulation: micro-batches per step; 0 likewise.
        sequence_parallel_size: so many ranks have the same pairs, each a part of every sequence.
    """

    kind: str
    ranks: int
    batch: int = 0
    accumulation: int = 0
    sequence_parallel_size: int = 1

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of them, that have pairs of their own."""
        return data_parallel_size(self.ranks, self.sequence_parallel_size)

    @property
    def pairs(self) -> int:
        """The global batch: pairs per step of all ranks together; 0 where it is not known."""
        return self.data_parallel_size * self.batch * self.accumulation

    @property
    def sharded(self) -> bool:
        """Whether each rank holds its own part of the optimizer's state."""
        return self.kind not in ("plain", "zero0")

    def __str__(self) -> str:
        name = {"plain": "DDP" if self.ranks > 1 else "", "fsdp": "FSDP"}.get(self.kind, f"ZeRO-{self.kind[-1]}")
        ranks = "one process" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{name} on {ranks}" if name else ranks

    @classmethod
    def of(cls, trainer: StepTrainer) -> Parallelism:
        """That of a trainer."""
        args: Any = trainer.args
        state: Any = trainer.accelerator.state
        kind = "plain"
        if trainer.is_deepspeed_enabled:
            kind = f"zero{int(state.deepspeed_plugin.zero_stage)}"
        elif trainer.is_fsdp_enabled:
            kind = "fsdp"
        batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        return cls(kind, args.world_size, batch, accumulation, trainer.sequence_parallel_size)

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint's folder."""
        write_json(checkpoint / _FILE, asdict(self))

    @classmethod
    def read(cls, checkpoint: Path) -> Parallelism:
        """What `save` wrote; of a checkpoint of an earlier release, what its files tell.

        Raises:
            ValueError: the file is not what `save` wrote.
        """
        path = checkpoint / _FILE
        if not path.is_file():
            return _guessed(checkpoint)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            kind, *numbers = (saved[name] for name in ("kind", "ranks", "batch", "accumulation"))
            # Not noted by earlier releases.
            numbers.append(saved.get("sequence_parallel_size", 1))
            made = cls(str(kind), *(int(number) for number in numbers))
            if made.data_parallel_size < 1 or made.kind not in ("plain", "fsdp", *(f"zero{n}" for n in range(4))):
                raise ValueError(f"{made.kind} on {made.ranks} ranks")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must say how the run was divided, got a damaged file ({error!r})") from error
        return made


def _guessed(checkpoint: Path) -> Parallelism:
    ranks = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if any(checkpoint.glob("global_step*")):
        parts = any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
        return Parallelism("zero3" if parts else "zero2", ranks)
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return Parallelism("fsdp", ranks)
    return Parallelism("plain", ranks)


def data_parallel_size(ranks: int, sequence_parallel_size: int) -> int:
    """Ranks, or groups of ranks that share sequences, with pairs of their own: what a global batch counts.

    Raises:
        ValueError: the ranks cannot be divided into such groups.
    """
    if ranks % sequence_parallel_size:
        raise ValueError(
            f"training.sequence_parallel_size must divide the number of ranks, {ranks}, got {sequence_parallel_size}"
        )
    return ranks // sequence_parallel_size


def fit_batch(saved: Parallelism, readers: int, batch: int, accumulation: int) -> tuple[int, int] | None:
    """Batch and accumulation with which another number of ranks keeps the global batch of a checkpoint.

    Args:
        saved: of the checkpoint.
        readers: `data_parallel_size` now.
        batch: pairs per rank and micro-batch as configured now; the one that is returned is not larger.
        accumulation: micro-batches per step as configured now.

    Returns:
        ``(batch, accumulation)``; None where what is configured stays: `data_parallel_size` is the same (whoever then
        changes the batch means it), the global batch is, or it is not known.

    Raises:
        ValueError: the global batch is no multiple of `readers`.
    """
    before = saved.data_parallel_size
    if readers == before or saved.pairs in (0, readers * batch * accumulation):
        return None
    if saved.pairs % readers:
        able = [str(number) for number in range(1, saved.pairs + 1) if saved.pairs % number == 0]
        shown = ", ".join(able if len(able) <= 8 else [*able[:6], "...", able[-1]])
        raise ValueError(
            "the number of ranks (over training.sequence_parallel_size) must divide the global batch of the "
            f"checkpoint, {saved.pairs} pairs ({before} x {saved.batch} x accumulation {saved.accumulation}), got "
            f"{readers}; start one of {shown}"
        )
    share = saved.pairs // readers
    fitting = max(size for size in range(1, min(batch, share) + 1) if share % size == 0)
    return fitting, share // fitting
