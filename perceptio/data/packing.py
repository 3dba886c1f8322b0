"""Packing: samples behind one another in rows, each seeing itself alone, in place of one padded row a sample.

The order of the samples stays, since images are found by the order of their tokens.

Shape legend: B samples, T tokens of the padded batch, R rows, L tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each sample of a batch stands."""

    lengths_B: tuple[int, ...]
    row_B: tuple[int, ...]
    start_B: tuple[int, ...]

    @classmethod
    def of(cls, lengths_B: Sequence[int], longest: int) -> Packing:
        """A new row where the next sample would make it longer than `longest` tokens, or than the longest sample."""
        limit, row, start = max(longest, *lengths_B), 0, 0
        rows, starts = [], []
        for length in lengths_B:
            if start + length > limit:
                row, start = row + 1, 0
            rows.append(row)
            starts.append(start)
            start += length
        return cls(tuple(lengths_B), tuple(rows), tuple(starts))

    def packed(self, values_BT: Tensor, fill: int) -> Tensor:
        """[R, L] of values [B, T] whose samples stand at the left."""
        ends = [start + length for start, length in zip(self.start_B, self.lengths_B, strict=True)]
        values_RL = values_BT.new_full((self.row_B[-1] + 1, max(ends)), fill)
        for b, (row, start, length) in enumerate(zip(self.row_B, self.start_B, self.lengths_B, strict=True)):
            values_RL[row, start : start + length] = values_BT[b, :length]
        return values_RL

    def unpacked(self, states_RLD: Tensor, tokens: int) -> Tensor:
        """[B, T, D] of states [R, L, D]; 0 behind a sample's end."""
        places = zip(self.row_B, self.start_B, self.lengths_B, strict=True)
        own = [states_RLD[row, start : start + length] for row, start, length in places]
        padded: Tensor = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, tokens - padded.shape[1]))

    def positions_and_sight(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each token's position in its sample [R, L], and which tokens it may attend to [R, 1, L, L]."""
        sample_BT = torch.arange(len(self.lengths_B), device=device)[:, None].expand(-1, max(self.lengths_B))
        position_BT = torch.arange(max(self.lengths_B), device=device).expand(len(self.lengths_B), -1)
        sample_RL = self.packed(sample_BT, -1)
        same_RLL = sample_RL[:, :, None] == sample_RL[:, None]
        return self.packed(position_BT, 0), same_RLL.tril()[:, None]
