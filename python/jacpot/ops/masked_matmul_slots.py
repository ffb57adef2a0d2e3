"""Products with a very sparse weight in 16 bits on tensor cores, see slots_cuda.hpp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacpot import _backend

__all__ = ["Slots", "columns_first", "multiply_slots"]

ROWS = 8  # of a window
WINDOWS = 4  # of a warp
BANKS = 8  # of 16 bytes, in shared memory
STEPS = 2  # of a block: sixteen slots, of which eight are read at a time
TILES = 4  # in shared memory, one of which is on its way
SPARE = 32  # words that are read ahead
LATE = TILES - 2  # tiles by which an entry may come after its own


@dataclass(frozen=True, eq=False)
class Slots:
    """A sparse matrix whose entries are dealt to what a tensor core takes at a time.

    Eight rows are a window. A step takes from a window one entry of each of the eight banks of
    shared memory, and there are as many steps as its fullest bank has entries; slots that nothing
    is left for stay empty. So that few do, the columns are dealt to banks such that those of every
    window are about equally full. With a tile of columns, entries of the two tiles before may be
    taken as well: by this freedom every warp takes about the same number of steps with each.

    Parameters
    ----------
    rotations
        ``(columns / 8,)`` uint8: column c lies in bank ``(c + rotations[c // 8]) % 8``.
    windows
        ``(warps, 4)`` int32: the windows of each warp, behind the last one where there is none.
    begins
        ``(warps · tiles · 4 + 1,)`` int32: where each window's blocks of each tile begin.
    places
        ``(slots,)`` int16: eight times the place in shared memory of each entry's column, plus its
        row in its window.
    sources
        ``(slots,)`` int32: which entry it is; -1 where there is none.
    tile
        Columns of a tile.
    """

    rotations: Tensor
    windows: Tensor
    begins: Tensor
    places: Tensor
    sources: Tensor
    tile: int

    @classmethod
    def of(cls, offsets: Tensor, indices: Tensor, columns: int) -> Slots:
        """Deal compressed rows: ``offsets (rows + 1,)``, ``indices (nnz,)``; waits for the GPU."""
        device, rows, nnz = indices.device, len(offsets) - 1, len(indices)
        tile = _backend.cuda().masked_matmul_slot_tile(columns, _backend.queue(offsets)[0])
        tiles, windows = max(1, -(-columns // tile)), -(-rows // ROWS)
        warps = -(-windows // WINDOWS)

        def count(n: int) -> Tensor:
            return torch.arange(n, device=device)

        row = torch.repeat_interleave(count(rows), offsets.diff().long(), output_size=nnz)
        window, column = row // ROWS, indices.long()
        rotations = _rotations(window, column, windows, columns)
        bank = (column + rotations[column // BANKS]) % BANKS
        time = column // tile

        # Entries of each window by bank, and their rank there when tiles come one by one.
        key = (window * BANKS + bank) * tiles + time
        order = key.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = count(nnz) - torch.searchsorted(key[order] // tiles, key[order] // tiles)
        there = torch.bincount(
            (window * tiles + time) * BANKS + bank, minlength=WINDOWS * warps * tiles * BANKS
        )
        there = there.view(WINDOWS * warps, tiles, BANKS).cumsum(1)

        by_length = there[:, -1].amax(1).argsort(descending=True, stable=True)
        of_warp = by_length.view(WINDOWS, warps)
        of_warp = torch.stack([p if i % 2 == 0 else p.flip(0) for i, p in enumerate(of_warp)], 1)
        steps, taken = _pace(there[of_warp])  # (warps, tiles, windows), (..., banks)
        sizes = (steps // STEPS).flatten()
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

        at = torch.empty_like(by_length)  # of each window, among those of all warps
        at[of_warp.flatten()] = count(WINDOWS * warps)
        warp, i = at[window] // WINDOWS, at[window] % WINDOWS
        when = time.clone()
        for late in range(LATE):
            when += rank >= taken[warp, (time + late).clamp_max(tiles - 1), i, bank]
        before = torch.where(when > 0, taken[warp, (when - 1).clamp_min(0), i, bank], 0)
        step = rank - before
        block = begins[(warp * tiles + when) * WINDOWS + i] + step // STEPS
        inside = bank // 2 * 4 + step % STEPS * 2 + bank % 2
        slot = block * (STEPS * BANKS) + inside

        of_slot = count(STEPS * BANKS)
        nothing = TILES * tile + of_slot // 4 * 2 + of_slot % 2  # columns of zeros, by their banks
        places = (nothing * ROWS).to(torch.int16).repeat(int(begins[-1]))
        sources = torch.full((len(places),), -1, dtype=torch.int32, device=device)
        local = column % tile
        place = time % TILES * tile + local // BANKS * BANKS + bank
        places[slot] = (place * ROWS + row % ROWS).to(torch.int16)
        sources[slot] = count(nnz).to(torch.int32)
        of_warp = of_warp.clamp_max(windows).to(torch.int32).contiguous()
        return cls(
            rotations.to(torch.uint8), of_warp, begins.to(torch.int32), places, sources, tile
        )

    @property
    def blocks(self) -> int:
        """Blocks of sixteen slots."""
        return len(self.places) // (STEPS * BANKS)


def _rotations(window: Tensor, column: Tensor, windows: int, columns: int) -> Tensor:
    """Deal columns to banks, eight after eight, each where it is needed most."""
    octets = -(-columns // BANKS)
    octet = column // BANKS
    order = octet.argsort(stable=True)
    sizes = torch.bincount(octet, minlength=octets).tolist()
    cells = torch.split((window * BANKS + column % BANKS)[order], sizes)
    turns = torch.arange(BANKS, device=column.device)
    banks = (turns + turns[:, None]) % BANKS  # (rotation, column): its bank
    out = torch.zeros(octets, dtype=torch.int64, device=column.device)
    held = torch.zeros(windows, BANKS, device=column.device)
    one = torch.ones(1, device=column.device)
    for o, cell in enumerate(cells):
        new = torch.zeros(windows * BANKS, device=column.device)
        new = new.index_add_(0, cell, one.expand(len(cell))).view(windows, BANKS)
        # To first order, what the fourth powers of the banks' excesses grow by.
        growth = new.t() @ (held - held.mean(1, keepdim=True)) ** 3  # (column, bank)
        best = growth.gather(1, banks.t()).sum(0).argmin(keepdim=True)
        out[o : o + 1] = best
        held.index_add_(1, banks.index_select(0, best)[0], new)
    return out


def _pace(there: Tensor) -> tuple[Tensor, Tensor]:
    """Say how many steps each window takes with each tile.

    Given what has come of each bank, ``there (warps, windows, tiles, banks)``, give the steps
    ``(warps, tiles, windows)``, even numbers, and what of each bank is then done
    ``(warps, tiles, windows, banks)``. What comes with a tile is done at most two tiles later.
    """
    warps, windows, tiles, banks = there.shape
    whole = there[:, :, -1].amax(-1).double()
    taken = there.new_zeros(warps, tiles, windows, banks)
    steps = there.new_zeros(warps, tiles, windows)
    for t in range(tiles):
        owed = whole.new_zeros(warps)  # by the windows before: a warp's steps are about its share
        for i in range(windows):
            done = taken[:, t - 1, i] if t else there.new_zeros(warps, banks)
            left = _even((there[:, i, t] - done).amax(-1))
            if t == tiles - 1:
                take = left
            else:
                so_far = steps[:, :t, i].sum(-1)
                share = (t + 0.3) / (tiles - 0.7)  # the last tile's entries can't come before it
                wanted = whole[:, i] * share - so_far + owed
                take = torch.minimum((wanted / STEPS).round().long().clamp_min(0) * STEPS, left)
                if t >= LATE:
                    late = _even((there[:, i, t - LATE] - done).amax(-1).clamp_min(0))
                    take = torch.maximum(take, late)
                owed = wanted - take
            steps[:, t, i] = take
            taken[:, t, i] = torch.minimum(there[:, i, t], done + take[:, None])
    return steps, taken


def _even(steps: Tensor) -> Tensor:
    return (steps + STEPS - 1) // STEPS * STEPS


def multiply_slots(
    slots: Slots, x: Tensor, values: Tensor, bias: Tensor | None, relu: bool, out: Tensor
) -> Tensor:
    """Write ``x (N, columns) @ S.T + bias`` into ``out (N, rows)`` of any strides."""
    x = x.detach()
    by_row = x.stride(1) == 1 and x.shape[1] % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == 0
    _backend.cuda().masked_matmul_slots(
        slots.rotations,
        slots.windows,
        slots.begins,
        slots.places,
        slots.sources,
        slots.tile,
        values.detach().contiguous(),
        slots.sources.new_empty(len(slots.sources) + SPARE),
        x.t() if by_row else columns_first(x),
        None if bias is None else bias.detach().contiguous(),
        relu,
        out.t(),
        *_backend.queue(x),
    )
    return out


def columns_first(x: Tensor) -> Tensor:
    """Give ``x (N, columns)`` as (columns, N), N rounded up to eight: a copy unless it is so."""
    n, columns = x.shape
    if n % 8 == x.data_ptr() % 16 == 0 and x.t().is_contiguous():
        return x.t()
    out = x.new_empty(columns, -(-n // 8) * 8)
    out[:, :n] = x.t()
    return out
