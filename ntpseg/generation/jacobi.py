"""Greedy masks in a few forward passes: the whole mask is drafted, read at once, and kept as far as it is greedy's.

Jacobi (fixed-point) decoding (Song et al., arXiv 2002.03629; Santilli et al., arXiv 2305.10427). One pass over a draft
gives greedy's token at every index for the draft's tokens before it, so the first token that differs from the draft,
and all before it, are greedy's own; what follows becomes the next draft. The cache is cut back to the last right token.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntpseg.generation.decoder import (
    DecodedBatch,
    Decoder,
    PromptBatch,
    RewindableDecoder,
    TargetTemplate,
    greedy_choice,
)

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.generation.token_stream import TokenSink
    from ntpseg.models.heads import NextKHeads

# A pass costs as much as reading this many tokens on top of those that it reads: overhead, and loading weights.
PASS_TOKENS = 256
# What a pass taught of a row's drafts counts this much less at the next: drafts are good where nothing is and bad along
# a lesion's boundary.
DECAY = 0.7


def jacobi(
    heads: NextKHeads,
    decoder: Decoder,
    target: TargetTemplate,
    prompts: PromptBatch,
    options: DecodingOptions,
    sink: TokenSink | None = None,
) -> DecodedBatch:
    """Decode a batch, see `StreamingMethodFunction`; `decoder` is a `RewindableDecoder`.

    The first draft is the stem's where the model has one, else blanks where it was trained on them: both are read
    together with the prompt. Otherwise the k heads and `copy_cells` draft.
    """
    return _Decoding(heads, cast(RewindableDecoder, decoder), target, prompts, options, sink).run()


class _Decoding:
    """One batch. Target indices of row b before ``final[b]`` hold greedy's tokens, the others a draft."""

    def __init__(
        self,
        heads: NextKHeads,
        decoder: RewindableDecoder,
        target: TargetTemplate,
        prompts: PromptBatch,
        options: DecodingOptions,
        sink: TokenSink | None,
    ) -> None:
        self.heads, self.decoder, self.target, self.prompts, self.sink = heads, decoder, target, prompts, sink
        self.dtype, self.device = heads.weight.dtype, target.forced.device
        self.low, self.end, self.batch = target.code_range[0], target.end, len(prompts)
        self.forced, self.grid_ids = target.forced[: self.end], target.grid_ids[: self.end]
        self.free = torch.tensor(target.free, device=self.device)
        # A column more takes what the heads draft beyond the end.
        self.tokens = F.pad(self.forced.expand(self.batch, -1), (0, heads.k))
        self.logprob = torch.zeros(self.batch, self.end, device=self.device)
        self.readout = target.readout if options.expected_readout else None
        self.patches: Tensor | None = None
        if self.readout is not None:
            self.patches = torch.zeros(self.batch, self.end, self.readout.patches.shape[1], device=self.device)
        self.final, self.told = [0] * self.batch, [0] * self.batch
        # Drafted tokens of each row that were right, and passes that a wrong one ended.
        self.right, self.wrong = np.zeros(self.batch), np.zeros(self.batch)

    def run(self) -> DecodedBatch:
        last, capacity = self.end - 1, self.prompts.max_length + self.end
        drafted = self.target.draft is not None
        # A pass reads the tokens starts[b] .. ends[b] - 1, the prompt's last being -1, and predicts each one's next.
        starts, ends = [-1] * self.batch, [last if drafted else 0] * self.batch
        if drafted:
            self._draft()
            grid_ids = self.grid_ids[:last].expand(self.batch, -1)
            hidden = self.decoder.start_with(self.prompts, capacity, self.tokens[:, :last], grid_ids).flatten(0, 1)
        else:
            hidden = self.decoder.start(self.prompts, capacity)
        steps = int(drafted)
        while True:
            before = self.final
            self.final = self._verify(hidden, starts, ends)
            self._tell()
            active = sum(final <= last for final in self.final)
            if not active:
                break
            # The last final token is a correction, which was not read.
            unread = [final - 1 for final in self.final]
            over = [end - kept if final <= last else 0 for end, kept, final in zip(ends, unread, self.final)]
            self.decoder.rewind(torch.tensor(over, device=self.device))
            # A pass over blanks proves nothing, and says nothing about the draft that it makes.
            blanks = steps == 1 and self.target.draft == "blanks"
            windows = [last] * self.batch if blanks else self._windows(before, ends, active)
            for row, (final, kept) in enumerate(zip(self.final, unread)):
                starts[row], ends[row] = (kept, min(kept + windows[row], last)) if final <= last else (0, 0)
            hidden = self._read(starts, ends)
            steps += 1
        patches = None if self.patches is None else self.patches[:, self.free]
        return DecodedBatch(self.tokens[:, self.free] - self.low, self.logprob[:, self.free], steps, patches)

    def _windows(self, before: Sequence[int], ends: Sequence[int], active: int) -> list[int]:
        """Tokens that each row reads next: as many as make a final token cheapest.

        If each token of a draft is right with probability p, a pass over w tokens, the first of which is final, is
        expected to prove ``(1 - p^w) / (1 - p)`` (speculative decoding, Leviathan et al., arXiv 2211.17192, eq. 1) and
        costs w and the row's share of `PASS_TOKENS`.
        """
        for row, (old, new, end) in enumerate(zip(before, self.final, ends)):
            if new > old:
                # The last one that was proved was not drafted: a correction, or what follows the last draft.
                self.right[row] = DECAY * self.right[row] + new - old - 1
                self.wrong[row] = DECAY * self.wrong[row] + float(new <= end)
        right = ((self.right + 2) / (self.right + self.wrong + 2.5))[:, None]
        tokens = np.arange(1, self.end + 1)
        proved = (1 - right**tokens) / (1 - right)
        return (1 + (proved / (tokens + PASS_TOKENS / active)).argmax(1)).tolist()

    def _draft(self) -> None:
        """The first draft of a model that has one of its own."""
        if self.target.draft == "stem":
            assert self.target.readout is not None and self.prompts.stem is not None
            self.tokens[:, self.free] = self.target.readout.nearest(self.prompts.stem.draft.sigmoid()) + self.low
        else:
            # No prediction equals a blank: the first pass keeps one token, and what it predicts is the draft.
            self.tokens[:, self.free] = self.target.blank

    def _read(self, starts: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Append each row's tokens ``starts[b] .. ends[b] - 1``; their hidden states ``[N, D]``."""
        row, index = self._places(starts, ends)
        counts = [end - start for start, end in zip(starts, ends)]
        return self.decoder.extend_ragged(counts, self.tokens[row, index], self.grid_ids[index])

    def _verify(self, hidden: Tensor, starts: Sequence[int], ends: Sequence[int]) -> list[int]:
        """Keep what the last pass proves, redraft the rest from it; each row's number of final tokens.

        Args:
            hidden: ``[N, D]`` of the tokens ``starts[b] .. ends[b] - 1`` of the rows; each predicts the next index.
            starts, ends: of each row.
        """
        row, index = self._places(starts, ends)
        index = index + 1
        logits = self.heads.logits(hidden.to(self.dtype), vocab_range=self.target.code_range)[:, 0].float()
        forced = self.forced[index]
        predicted = torch.where(forced >= 0, forced, logits.argmax(-1) + self.low)
        # The last prediction of a row has no token that was read to agree with.
        until = torch.tensor(ends, device=self.device)
        differs = (predicted != self.tokens[row, index]) | (index == until[row])
        first = until.scatter_reduce(0, row, torch.where(differs, index, self.end), "amin")
        self.tokens[row, index] = predicted
        kept = index <= first[row]
        row, index, logits, hidden = row[kept], index[kept], logits[kept], hidden[kept]
        self.logprob[row, index] = greedy_choice(logits)[1]
        if self.readout is not None and self.patches is not None:
            self.patches[row, index] = self.readout.expected(logits)
        if self.target.draft is None:
            edge = index == first[row]
            self._redraft(row[edge], first[row[edge]], until[row[edge]], hidden[edge])
        read = [end > start for start, end in zip(starts, ends)]
        return [one + 1 if moved else old for one, moved, old in zip(first.tolist(), read, self.final)]

    def _redraft(self, rows: Tensor, first: Tensor, until: Tensor, hidden: Tensor) -> None:
        """Where a model has no draft of a mask: the k heads after the last final token, copies beyond the window.

        Args:
            rows: int64 ``[A]``.
            first: int64 ``[A]``, the last final index.
            until: int64 ``[A]``, the last index that the pass predicted.
            hidden: ``[A, D]``, the state that predicted index `first`.
        """
        k = self.heads.k
        if k > 1:
            later = self.heads.logits(hidden.to(self.dtype), heads=k, vocab_range=self.target.code_range)[:, 1:]
            index = first[:, None] + torch.arange(1, k, device=self.device)
            forced = F.pad(self.forced, (0, k), value=self.low)[index]
            drafted = torch.where(forced >= 0, forced, later.float().argmax(-1) + self.low)
            self.tokens[rows[:, None], index] = drafted
            until = torch.maximum(until, first + k - 1)
        known = torch.searchsorted(self.free, until, right=True)
        codes = self.tokens[rows[:, None], self.free]
        self.tokens[rows[:, None], self.free] = copy_cells(codes, known, self.target.columns)

    def _places(self, starts: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row and index, int64 ``[N]`` each, of ``starts[b] .. ends[b] - 1`` of every row."""
        first, counts = np.asarray(starts), np.asarray(ends) - np.asarray(starts)
        row = np.repeat(np.arange(self.batch), counts)
        index = np.arange(len(row)) + np.repeat(first - (counts.cumsum() - counts), counts)
        rows, indices = torch.from_numpy(np.stack([row, index])).to(self.device)
        return rows, indices

    def _tell(self) -> None:
        if self.sink is None:
            return
        for row, final in enumerate(self.final):
            first, cells = self.told[row], bisect.bisect_left(self.target.free, final)
            if cells > first:
                here = self.free[first:cells]
                patches = None if self.patches is None else self.patches[row, here]
                self.sink.write(row, first, self.tokens[row, here] - self.low, self.logprob[row, here], patches)
            self.told[row] = cells


def copy_cells(codes: Tensor, known: Tensor, columns: int) -> Tensor:
    """Fill a mask from its first cells: each other is the one above it, in the first row the one to its left.

    Args:
        codes: ``[B, h * w]`` int64.
        known: ``[B]`` int64, how many cells of each are kept, >= 1.
        columns: w.

    Returns:
        ``[B, h * w]``.
    """
    cell = torch.arange(codes.shape[1], device=codes.device)
    known = known[:, None]
    up = cell - columns * ((cell - known) // columns + 1).clamp(min=0)
    # Above an unknown cell of the first row there is none: the last known one is what lies to the left.
    return codes.gather(1, torch.where(up < 0, known - 1, up))
