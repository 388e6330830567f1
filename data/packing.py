"""Several sequences in one row: which go together."""

from collections.abc import Sequence

from unitok.core.errors import DataError


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the sequences that share a row of at most `capacity`, row by row.

    The longest is placed first, each into the first row that still has room (at most 11/9 of the fewest rows, plus
    one). Depends on the lengths alone; within a row the given order is kept. DataError for one longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        if length > capacity:
            raise DataError(f"a sequence of {length} does not fit a row of {capacity}")
        row = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= length
    return [sorted(row) for row in rows]
