"""What a run sets of its optimizer, kept when a checkpoint's state is loaded.

PyTorch saves learning rate, weight decay and the like with an optimizer's state, and the base rates with a schedule's.
A run that goes on with another learning rate, as after a divergence, would get that of the checkpoint back.
"""

from __future__ import annotations

from typing import Any

# A group's own; Muon's momentum and rate are in the section of a configuration that a resumed run must not change.
_KEPT = ("weight_decay", "betas", "eps")


class OptimizerSettings:
    """The settings of an optimizer's groups, to be made before a checkpoint is loaded.

    Args:
        optimizer: whose they are.
    """

    def __init__(self, optimizer: Any) -> None:
        groups = optimizer.param_groups
        self.rates = [group.get("initial_lr", group["lr"]) for group in groups]
        self.groups = [{key: group[key] for key in _KEPT if key in group} for group in groups]

    def restore(self, optimizer: Any, scheduler: Any) -> list[str]:
        """Give optimizer and schedule these settings again, after a checkpoint was loaded.

        A rate keeps its place in the schedule. One without base rates (``ReduceLROnPlateau``) has the checkpoint's.

        Args:
            optimizer: of the groups that `self` was made of.
            scheduler: of its learning rate.

        Returns:
            What changed, for example ``"learning rate 0.002 -> 1e-05"``; each once.
        """
        groups = optimizer.param_groups
        if len(groups) != len(self.groups):
            return []
        changed: dict[str, None] = {}
        for group, own in zip(groups, self.groups):
            for key, value in own.items():
                if _plain(group[key]) != _plain(value):
                    changed[f"{key} {_plain(group[key])} -> {_plain(value)}"] = None
                    group[key] = value
        bases = getattr(scheduler, "base_lrs", None)
        if bases is None or len(bases) != len(groups):
            return list(changed)
        for index, (group, rate, before) in enumerate(zip(groups, self.rates, bases)):
            # Adafactor may have none, and finds its own.
            if before is None or rate is None or float(before) == float(rate):
                continue
            changed[f"learning rate {float(before):g} -> {float(rate):g}"] = None
            group["initial_lr"] = bases[index] = rate
            group["lr"] = float(group["lr"]) * float(rate) / float(before) if before else rate
        scheduler._last_lr = [group["lr"] for group in groups]
        return list(changed)


def _plain(value: Any) -> Any:
    """Tuples and lists alike: which of them a checkpoint holds depends on its format."""
    return tuple(value) if isinstance(value, list) else value
