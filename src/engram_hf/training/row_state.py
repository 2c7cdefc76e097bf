"""Files with the state of a table's rows, where the table is cut over ranks: one file for the rows of each rank.

A file has the state of those rows that training has touched:

* `row_ids`, (n,) int64, ascending: row ids of the table;
* `wide` and `narrow`, (n, names of the rule, width or 1), where the rule has such names;
* `stamp`, (16,) uint8, of the run and step.

They lie in the checkpoint beside optimizer.pt, which names them. They are written and read in pieces, and any number of
ranks can read them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..modeling.disk_files import TableFile
from ..modeling.disk_safetensors import TensorContent
from ..modeling.table import EngramTable
from ..modeling.table_ranks import SENT_BYTES


ROW_IDS, STAMP = "row_ids", "stamp"


def find_state(names: Sequence[str], folders: Sequence[Path], stamp: str, where: str) -> list[TableFile]:
    """Open the files of one table's rows, in the first folder that has all of them, of the run and step that are meant.

    A run may begin from the checkpoint of an earlier one, whose files have the same names.

    Args:
        names: of the files.
        folders: where the checkpoint may lie.
        stamp: in hexadecimal, that they must have.
        where: the table, for messages.

    Raises:
        ValueError: no folder has them, or one is damaged, or it is of another run or step.
    """
    known = list(dict.fromkeys(folders))
    wrong = None
    for folder in known:
        if all((folder / name).is_file() for name in names):
            files = [TableFile(folder / name) for name in names]
            other = next((file for file in files if _stamp_of(file) != stamp), None)
            if other is None:
                return files
            wrong = wrong or other.path
    if wrong is not None:
        raise ValueError(
            f"{wrong} is of another run or step than optimizer.pt of the checkpoint. Copy the whole folder of the "
            "checkpoint again."
        )
    raise ValueError(
        f"optimizer.pt of the checkpoint leaves the state of {where} to {len(names)} files beside it "
        f"({names[0]}, ...), and not all of them are in {' or '.join(map(str, known))}. Copy the whole folder of "
        "the checkpoint, and load the model from it: from_pretrained(checkpoint)."
    )


def _stamp_of(file: TableFile) -> str | None:
    return bytes(file.tensor(STAMP).tolist()).hex() if STAMP in file.places else None


def check_state(file: TableFile, wanted: Mapping[str, tuple[int, ...]], table: EngramTable, where: str) -> None:
    """See that a file has the state of rows of a table.

    Args:
        file: of one rank.
        wanted: names of tensors to their shapes without the number of rows.
        table: whose rows they are.
        where: the table, for messages.

    Raises:
        ValueError: a tensor is missing, or of another shape or type, or row ids do not ascend or are not the table's.
    """
    ids = file.places.get(ROW_IDS)
    count = ids.shape[0] if ids is not None and len(ids.shape) == 1 and ids.dtype == torch.int64 else None
    for name, shape in wanted.items():
        place = file.places.get(name)
        is_number = place is not None and place.dtype is not None and place.dtype.is_floating_point
        if count is None or place is None or not is_number or place.shape != (count, *shape):
            raise ValueError(
                f"{file.path} is damaged, or not of this optimizer: it must hold row ids and {name} of the rows of "
                f"{where}, of the shape (n, {', '.join(map(str, shape))}). Resume with the same row_optimizer, or copy "
                "the checkpoint again."
            )
    last = -1
    for start, end in _spans(file):
        row_ids = torch.cat([torch.tensor([last]), read_rows(file, ROW_IDS, start, end)])
        last = int(row_ids[-1])
        if (row_ids[1:] <= row_ids[:-1]).any() or last >= table.num_rows:
            raise ValueError(
                f"Row ids of {file.path} do not ascend, or are not below the {table.num_rows} rows of {where}. Copy "
                "the checkpoint again."
            )


def rows_held(file: TableFile, table: EngramTable) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Held ids of rows of a file that this process holds, (n,), and their state by name, a piece at a time."""
    names = [name for name in file.places if name not in (ROW_IDS, STAMP)]
    for start, end in _spans(file):
        row_ids = read_rows(file, ROW_IDS, start, end)
        are_held = table.are_held(row_ids)
        if are_held is None:
            yield row_ids, {name: read_rows(file, name, start, end) for name in names}
        elif are_held.any():
            values = {name: read_rows(file, name, start, end)[are_held] for name in names}
            yield table.held_ids(row_ids[are_held]), values


def _spans(file: TableFile) -> Iterator[tuple[int, int]]:
    """Runs of rows that are read at once."""
    rows = file.places[ROW_IDS].shape[0]
    nbytes = max(place.nbytes // max(1, rows) for name, place in file.places.items() if name != STAMP)
    at_once = max(1, SENT_BYTES // max(1, nbytes))
    yield from ((start, min(start + at_once, rows)) for start in range(0, rows, at_once))


def read_rows(file: TableFile, name: str, start: int, end: int) -> torch.Tensor:
    """Rows of a tensor of a file, read and not mapped."""
    place = file.places[name]
    rows = torch.empty(end - start, *place.shape[1:], dtype=file.dtype_of(name))
    if rows.numel():
        row_nbytes = place.nbytes // place.shape[0]
        file.read_bytes(name, start * row_nbytes, memoryview(rows.view(-1).view(torch.uint8).numpy().data))
    return rows


def stamp_content(stamp: bytes) -> TensorContent:
    """The stamp of a run and step, to be written to a file."""
    return TensorContent.of(torch.tensor(list(stamp), dtype=torch.uint8))
