"""What lies beside a record: the outcome of each sample, which paired tests compare, and other files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_bench.files import atomic_folder

SAMPLE_COLUMNS = ("sample_id", "label", "prediction", "correct")


def write_samples(samples: Mapping[str, Sequence[Any]], path: Path) -> None:
    """`sample_id` is what paired tests match two runs on, so it must be unique."""
    # Imported here: those who only look up records need not wait for it.
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    assert set(samples) == set(SAMPLE_COLUMNS), f"expected the columns {SAMPLE_COLUMNS}, found {tuple(samples)}"
    ids = list(samples["sample_id"])
    assert all(isinstance(name, str) for name in ids), "expected a value in every row of every column"
    assert len(set(ids)) == len(ids), "sample_id: expected no id twice"
    # Out of buffers, because pyarrow.array() imports pandas to see whether it was given something of pandas.
    encoded = [name.encode("utf-8", "backslashreplace") for name in ids]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    text = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(encoded))]
    columns = {"sample_id": pyarrow.Array.from_buffers(pyarrow.large_string(), len(ids), text)}
    for name in ("label", "prediction"):
        values = np.asarray(samples[name])
        assert values.dtype.kind in "iu", f"{name}: expected whole numbers in every row, found {values.dtype}"
        whole = np.ascontiguousarray(values, dtype=np.int64)
        columns[name] = pyarrow.Array.from_buffers(pyarrow.int64(), len(whole), [None, pyarrow.py_buffer(whole)])
    correct = np.asarray(samples["correct"])
    assert correct.dtype == np.bool_, f"correct: expected booleans in every row, found {correct.dtype}"
    bits = pyarrow.py_buffer(np.packbits(correct, bitorder="little"))
    columns["correct"] = pyarrow.Array.from_buffers(pyarrow.bool_(), len(correct), [None, bits])
    assert len({len(column) for column in columns.values()}) == 1, "expected columns of the same length"
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(columns.values()), names=list(columns)), content)
    path.write_bytes(content.getvalue())


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Let `folder` hold these files, by name, and no others; none at all if there are none."""
    if folder.exists():
        shutil.rmtree(folder)
    if files:
        with atomic_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
