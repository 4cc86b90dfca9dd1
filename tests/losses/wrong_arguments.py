"""Wrong arguments of the loss, each with the message that every backend must give."""

from __future__ import annotations

from typing import Any

import torch

from ntpseg import HardTokens, NumItems

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
HIDDEN = torch.linspace(-1, 1, 2 * 5 * 3 * 4).view(2, 5, 3, 4)
WEIGHT = torch.linspace(-1, 1, 7 * 4).view(7, 4)
LABELS = torch.tensor([[0, 1, 2, -100, 3], [4, 5, 6, 0, 1]])
SLOTS = torch.ones(2, 3, dtype=torch.int64)


def put(tensor: torch.Tensor, value: float, sample: int = 1, position: int = 2) -> torch.Tensor:
    """A copy with one other element."""
    changed = tensor.clone()
    changed[sample, position] = value
    return changed


WEIGHTS = torch.ones(2, 5)
BAD_WEIGHT = "token_weights must be finite and >= 0 where there is a label"

# what is wrong -> the beginning of the message
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden": None}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got None"),
    ({"hidden": HIDDEN.numpy()}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got a ndarray"),
    ({"hidden": HIDDEN.long()}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got int64 [2, 5, 3, 4]"),
    ({"hidden": HIDDEN.to(torch.complex64)}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got complex64"),
    ({"hidden": HIDDEN[0, 0]}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got float32 [3, 4]"),
    ({"hidden": HIDDEN.to_sparse()}, "hidden must be a float [B, T, k, D] or [B, T, D] tensor, got sparse_coo float32"),
    ({"hidden": HIDDEN[:, :, :0]}, "hidden must have k >= 1 heads and D >= 1 features, got float32 [2, 5, 0, 4]"),
    ({"hidden": HIDDEN[..., :0]}, "hidden must have k >= 1 heads and D >= 1 features, got float32 [2, 5, 3, 0]"),
    (
        {"hidden": HIDDEN[:, :0], "labels": LABELS[:, :0]},
        "hidden must have T >= 1 positions, got float32 [2, 0, 3, 4]",
    ),
    ({"weight": [[1.0]]}, "weight must be a float [V, D] or [k, V, D] tensor, got a list"),
    ({"weight": WEIGHT.int()}, "weight must be a float [V, D] or [k, V, D] tensor, got int32 [7, 4]"),
    ({"weight": WEIGHT[:, :3]}, "weight must be a float [V, 4] or [3, V, 4] tensor, got float32 [7, 3]"),
    ({"weight": WEIGHT.expand(2, 7, 4)}, "weight must be a float [V, 4] or [3, V, 4] tensor, got float32 [2, 7, 4]"),
    ({"weight": WEIGHT[:0]}, "weight must hold V >= 1 classes, got float32 [0, 4]"),
    ({"weight": WEIGHT.to("meta")}, "weight must be on the device of hidden (cpu), got meta"),
    ({"labels": None}, "labels must be an int64 [2, 5] tensor, got None"),
    ({"labels": LABELS.float()}, "labels must be an int64 [2, 5] tensor, got float32 [2, 5]"),
    ({"labels": LABELS > 0}, "labels must be an int64 [2, 5] tensor, got bool [2, 5]"),
    ({"labels": LABELS[:1]}, "labels must be an int64 [2, 5] tensor, got int64 [1, 5]"),
    ({"labels": LABELS.T}, "labels must be an int64 [2, 5] tensor, got int64 [5, 2]"),
    ({"labels": LABELS.to("meta")}, "labels must be on the device of hidden (cpu), got meta"),
    ({"labels": put(LABELS, 7)}, "labels must be ignore_index or in [0, 7), got 7"),
    ({"labels": put(LABELS, -1)}, "labels must be ignore_index or in [0, 7), got -1"),
    ({"labels": put(LABELS, 2**40)}, "labels must be ignore_index or in [0, 7), got 1099511627776"),
    ({"labels": put(LABELS, -(2**63))}, "labels must be ignore_index or in [0, 7), got -9223372036854775808"),
    ({"labels": put(LABELS, 2**63 - 1)}, "labels must be ignore_index or in [0, 7), got 9223372036854775807"),
    ({"labels": put(put(LABELS, 9), 8, 0)}, "labels must be ignore_index or in [0, 7), got 8"),
    ({"labels": LABELS, "ignore_index": 3}, "labels must be ignore_index or in [0, 7), got -100"),
    ({"labels": put(LABELS, 7, 0, 0), "shift": False}, "labels must be ignore_index or in [0, 7), got 7"),
    ({"vocab_range": (2, 5)}, "labels must be ignore_index or in [2, 5), got 1"),
    *(
        ({"vocab_range": value}, f"vocab_range must be two integers (lo, hi) with 0 <= lo < hi, got {value!r}")
        for value in (
            (None, 7),
            (0, None),
            (3, 3),
            (5, 2),
            (-1, 3),
            (0.0, 7.0),
            (0, 7, 1),
            7,
            "07",
            (True, 7),
            (0, NAN),
        )
    ),
    ({"vocab_range": (0, HUGE)}, "vocab_range must be two integers (lo, hi) with 0 <= lo < hi, got (0, 1000"),
    ({"vocab_range": (0, 10**5000)}, "vocab_range must be two integers (lo, hi) with 0 <= lo < hi, got a tuple"),
    ({"vocab_range": (0, 8)}, "vocab_range must end within the 7 classes, got (0, 8)"),
    *(
        ({"negatives": value}, f"negatives must be an integer >= 0, got {value!r}")
        for value in (-1, 2.0, True, None, "5")
    ),
    ({"negatives": HUGE}, "negatives must be an integer >= 0 and <= 9223372036854775807, got an integer of 1329 bits"),
    *(
        ({name: value}, f"{name} must be a number >= 0, got {value!r}")
        for name in ("tcl_weight", "het_weight")
        for value in (-1.0, NAN, INF, None, "1", True)
    ),
    ({"tcl_weight": HUGE}, "tcl_weight must be a number >= 0, got an integer of 1329 bits"),
    *(({"temperature": v}, f"temperature must be a number > 0, got {v!r}") for v in (0, 0.0, -1.0, NAN, INF, None)),
    *(
        ({"head_weights": v}, "head_weights must be finite numbers >= 0, not all zero, got ")
        for v in ([1.0, -1.0, 0.0], [0.0] * 3, [NAN, 1.0, 1.0], [INF, 1, 1], [], 3, "abc", [None] * 3, [[1, 1, 1]])
    ),
    ({"head_weights": torch.tensor([1.0, NAN, 1.0])}, "head_weights must be finite numbers >= 0, not all zero, got "),
    ({"head_weights": [1.0]}, "head_weights must hold 3 numbers, one per head, got [1.0]"),
    *(
        ({"ignore_index": v}, "ignore_index must be an integer >= -9007199254740992")
        for v in (NAN, 1.5, None, True, HUGE)
    ),
    *(({"shift": value}, f"shift must be True or False, got {value!r}") for value in (1, 2, None, "yes")),
    *(
        ({"num_items": v}, "num_items must be finite and >= 0, got ")
        for v in (-1, NAN, INF, HUGE, True, "3", {"rows": 3}, torch.tensor(-1), torch.tensor(NAN), torch.tensor(True))
    ),
    ({"num_items": [1]}, "num_items must be a NumItems or one number, got [1"),
    ({"num_items": torch.ones(2)}, "num_items must be a NumItems or one number, got [1.0, 1.0]"),
    ({"num_items": torch.tensor(2.0, device="meta")}, "num_items must be finite and >= 0, got float32 [] on meta"),
    ({"num_items": NumItems([1, 2], 0)}, "num_items.rows must hold 3 numbers, one per head, got [1, 2]"),
    ({"num_items": NumItems(5.0, 0)}, "num_items.rows must hold 3 numbers, one per head, got 5.0"),
    ({"num_items": NumItems([], 0)}, "num_items.rows must hold 3 numbers, one per head, got []"),
    ({"num_items": NumItems([1, 2, NAN], 0)}, "num_items.rows must be finite and >= 0, got [1, 2, nan]"),
    (
        {"num_items": NumItems(torch.tensor([1.0, -2.0, 3.0]))},
        "num_items.rows must be finite and >= 0, got [1.0, -2.0, 3.0]",
    ),
    ({"num_items": NumItems([1, 2, 3], -2)}, "num_items.het must be finite and >= 0, got -2"),
    ({"num_items": NumItems([1, 2, 3], torch.tensor(INF))}, "num_items.het must be finite and >= 0, got inf"),
    ({"num_items": NumItems([1, 2, 3], [1, 2])}, "num_items.het must be one number, got [1, 2]"),
    *(
        (
            {"token_weights": put(WEIGHTS, v).to(d)},
            f"token_weights must be finite and >= 0 where there is a label, got {v:g}",
        )
        for v in (NAN, INF, -INF, -1.0)
        for d in (torch.float32, torch.bfloat16, torch.float64)
    ),
    ({"token_weights": put(WEIGHTS.double(), 1e300)}, f"{BAD_WEIGHT}, got 1e+300"),
    ({"token_weights": WEIGHTS[:, :4]}, "token_weights must be a float [2, 5] tensor, got float32 [2, 4]"),
    ({"token_weights": LABELS}, "token_weights must be a float [2, 5] tensor, got int64 [2, 5]"),
    ({"token_weights": [1.0]}, "token_weights must be a float [2, 5] tensor, got a list"),
    ({"token_weights": WEIGHTS.to("meta")}, "token_weights must be on the device of labels (cpu), got meta"),
    ({"het": (SLOTS, SLOTS)}, "het must be a HardTokens, got a tuple"),
    ({"het": HardTokens(SLOTS[:1], SLOTS)}, "het.position must be an int64 [2, n] tensor, got int64 [1, 3]"),
    ({"het": HardTokens(SLOTS, SLOTS.float())}, "het.token must be an int64 [2, 3] tensor, got float32 [2, 3]"),
    ({"het": HardTokens(SLOTS, SLOTS[:, :2])}, "het.token must be an int64 [2, 3] tensor, got int64 [2, 2]"),
    ({"het": HardTokens(SLOTS, SLOTS.to("meta"))}, "het.token must be on the device of labels (cpu), got meta"),
    ({"bias": torch.zeros(6)}, "bias must be a float [7] tensor, got float32 [6]"),
    ({"bias": torch.zeros(7, dtype=torch.int64)}, "bias must be a float [7] tensor, got int64 [7]"),
    ({"bias": 0.5}, "bias must be a float [7] tensor, got a float"),
    ({"group": "world"}, "group must be a torch.distributed.ProcessGroup, got a str"),
]

# fields of LossOptions that are no keyword of ntp_loss
REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"softcap": v}, f"softcap must be a number > 0, got {v!r}") for v in (0, 0.0, -1.0, NAN, INF, "30")),
    *(({"logit_scale": v}, f"logit_scale must be a number, got {v!r}") for v in (NAN, INF, None)),
    ({"logit_scale": 0.0}, "logit_scale must not be 0, got 0.0"),
    *(
        ({"label_smoothing": v, "negatives": 0}, "label_smoothing must be a number >= 0 and < 1")
        for v in (-0.1, 1, NAN)
    ),
    *(({"z_loss": v}, f"z_loss must be a number >= 0, got {v!r}") for v in (-1.0, NAN)),
    *(({"gradient_filter": v}, "gradient_filter must be a number >= 0 and < 1, got ") for v in (1.0, -0.5, NAN)),
    *(({"max_rows": v}, f"max_rows must be an integer >= 1, got {v!r}") for v in (0, 2.0, True)),
    *(({"chunk_bytes": v}, f"chunk_bytes must be an integer >= 1, got {v!r}") for v in (0, 0.5, "1")),
    *(
        ({"workspace": v}, f"workspace must be one of auto, small, fast, got {v!r}")
        for v in ("large", "Fast", "", None, 1, True)
    ),
    *(({"per_head": v}, f"per_head must be True or False, got {v!r}") for v in (1, None)),
]
