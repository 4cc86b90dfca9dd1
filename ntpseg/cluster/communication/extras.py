"""What this package sends besides weights and gradients: counts, logs, hard tokens, and a vocabulary over ranks."""

from __future__ import annotations

from ntpseg.cluster.communication.collective import Collective, grouped

_FLOAT, _DOUBLE, _LONG = 4, 8, 8


def training_collectives(heads: int, terms: int, *, logged: bool = True) -> list[Collective]:
    """The small collectives of `NTPSegTrainer` in one optimizer step, whatever the strategy.

    Args:
        heads: k.
        terms: terms of the loss that are logged (ntp, nktp, tcl, het and the losses on pixels in use).
        logged: it is a step after which figures are logged (one in ``logging_steps``).
    """
    found = [
        Collective("all_reduce", _DOUBLE * (heads + 6), 1, "step", "counts that the loss is divided by"),
        Collective("all_reduce", _FLOAT * 4, 1, "step", "flags of a step to be skipped"),
    ]
    if logged:
        found += [
            Collective("all_reduce", _DOUBLE * (1 + terms + 2), 1, "step", "sums of the logged loss"),
            Collective("all_reduce", _DOUBLE * 2, 1, "step", "slowest rank's figures"),
        ]
    return found


def logged_gathers(ranks: int) -> list[Collective]:
    """The two numbers that the Hugging Face Trainer gathers for a log of its own."""
    return [Collective("all_gather", _FLOAT * ranks, 2, "step", "the Trainer's logged loss")]


def het_exchange(
    rows: tuple[int, int], hard_tokens: int, ranks: int, *, round_bytes: int = 1 << 28
) -> list[Collective]:
    """One exchange of `ntpseg.memory.exchange`, between memories that have met before, with all entries in use.

    Args:
        rows: the most rows that any rank has changed since the last exchange, of the last epoch and of the running one.
        hard_tokens: n, entries of a row. A row that travels is its int64 number, an int32 count and 3 int32 an entry.
        ranks: of the group.
        round_bytes: most bytes of a round over all ranks.
    """
    if ranks == 1:
        return []
    row_bytes = 12 * (hard_tokens + 1)
    chunk = max(1, round_bytes // (ranks * row_bytes))
    sizes = [min(chunk, count - start) for count in rows for start in range(0, count, chunk)]
    return [
        Collective("all_gather", 2 * _LONG * ranks, 1, "step", "epochs of the hard-token memories"),
        # One more of each epoch says that nothing is left.
        Collective("all_gather", 3 * _LONG * ranks, len(sizes) + len(rows), "step", "counts of hard-token rows"),
        *grouped("all_gather", [size * ranks * row_bytes for size in sizes], "step", "hard-token rows"),
    ]


def vocab_parallel_loss(
    rows: int, features: int, blocks: int, negatives: int, hard_tokens: int, ranks: int, *, work_bytes: int = 4
) -> list[Collective]:
    """`ntpseg.losses.vocab_parallel` for one call, forward and backward, no block being recomputed.

    Per row: the target's logit, the maximum, its class (int64), the sum, and the logits of negatives and hard tokens;
    once the gradient of the hidden states, in the working dtype.

    Args:
        rows: R, supervised rows of all heads.
        features: elements of the hidden states' gradient, R x D.
        blocks: into which the rows are cut, equally (`ntpseg.losses.products.Tiling`).
        negatives: m.
        hard_tokens: the most that any row has, h.
        ranks: that share the vocabulary.
        work_bytes: of the working dtype, float32 (8 for float64 operands).
    """
    if ranks == 1:
        return []
    size = -(-rows // max(blocks, 1))
    cut = [min(size, rows - start) for start in range(0, rows, size)] if rows else []
    number, token = [n * work_bytes for n in cut], [n * (negatives + hard_tokens) * work_bytes for n in cut]
    return [
        Collective("all_gather", _LONG * ranks, 1, "forward", "sizes of the vocabulary's shards"),
        *grouped("all_reduce", number * 3, "forward", "logits of targets, maxima, sums"),
        *grouped("all_reduce", [n * _LONG for n in cut], "forward", "classes of the maxima"),
        *grouped("all_reduce", token, "forward", "logits of negatives and hard tokens"),
        *grouped("all_reduce", [features * work_bytes], "forward", "gradient of the hidden states"),
    ]
