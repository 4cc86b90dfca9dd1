"""How a run computes: which sharding, which precision, on what kind of device; and the bytes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from ntpseg.utils.checks import check_choice

# How ranks share what training keeps, from nothing to everything; one: a process by itself.
SHARDINGS = ("one", "ddp", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cuda", "cpu")
OFFLOADS = ("none", "optimizer")
# Activations of these never hold a matrix of attention probabilities.
_FUSED_ATTENTION = ("flash", "flash_attention_2", "flash_attention_3", "xformers", "sdpa", "flex", "flex_attention")


@dataclass(frozen=True)
class Numerics:
    """Precision, sharding and device of a run.

    Attributes:
        sharding: one of `SHARDINGS`.
        precision: one of `PRECISIONS`. In bfloat16 the ZeRO stages hold bfloat16 weights and float32 masters, FSDP
            float32 shards that it gathers as bfloat16, one and ddp float32 weights under autocast.
        device: one of `DEVICES`; decides which attention and which loss kernels run.
        offload: one of `OFFLOADS`; DeepSpeed keeps masters, optimizer and partitioned gradients in host memory
            (ZeRO-Offload, arXiv 2101.06840).

    Raises:
        ValueError: an unknown name, or optimizer offload without ZeRO.
    """

    sharding: str = "one"
    precision: str = "bfloat16"
    device: str = "cuda"
    offload: str = "none"

    def __post_init__(self) -> None:
        check_choice("sharding", self.sharding, SHARDINGS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("device", self.device, DEVICES)
        check_choice("offload", self.offload, OFFLOADS)
        if self.offload != "none" and self.sharding not in ("zero2", "zero3"):
            raise ValueError(f"sharding must be zero2 or zero3 with offload, got {self.sharding!r}")

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.sharding.startswith("zero")

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast for every product."""
        return self.precision == "bfloat16" and self.sharding in ("one", "ddp")

    @property
    def product_bytes(self) -> int:
        """Of a number in the matrix products, and of most activations."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def residual_bytes(self) -> int:
        """Of a number of the residual stream: autocast adds bfloat16 to float32 embeddings."""
        return 4 if self.autocast else self.product_bytes

    @property
    def weight_bytes(self) -> int:
        """Of a weight as the model holds it, and of its gradient."""
        return self.product_bytes if self.zero else 4

    def fused_attention(self, attention: str | None, tokens: int, blocked: range) -> bool:
        """Whether attention keeps no probabilities: every one on a GPU but eager; on a CPU out of the `blocked`."""
        if attention in _FUSED_ATTENTION:
            return True
        if attention == "eager":
            return False
        return self.device == "cuda" or tokens not in blocked
