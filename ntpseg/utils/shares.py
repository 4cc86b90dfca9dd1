"""How a size is divided among ranks."""

from __future__ import annotations


def even_share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last + 1 of the entries of `rank`: the ceiling of `size` / `world_size` each, the last ones fewer.

    As `torch.chunk`, FSDP2 and DeepSpeed divide.
    """
    share = -(-size // world_size)
    return min(rank * share, size), min((rank + 1) * share, size)
