"""Where a number comes from: the page of every record, and the way there.

    records/{model}/{weights_sha12}/{dataset}.html#{protocol}-{recipe}@v{version}

The pages lie as the record files do, so that a reader who has one finds the other. All links are relative: the folder
can be moved, zipped and opened from a disk.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ssl_bench.leaderboards.record import Record
from ssl_bench.leaderboards.report.words import in_order
from ssl_bench.leaderboards.store import Results


@dataclass
class Places:
    """Which records the report shows, and where; whoever shows a number asks for its place here.

    `numbers` are the ways back: where the number of a record is shown.
    """

    results: Results
    shown: dict[Path, None] = field(default_factory=dict)
    numbers: dict[Path, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))  # place -> what it is

    def __post_init__(self) -> None:
        """Records are found by what they are, since two may be equal in all but their files."""
        pairs = zip(self.results.records, self.results.paths, strict=True)
        self._paths = {id(record): path for record, path in pairs}

    def in_order(self) -> list[Record]:
        """All records, those of one page together, as people list runs."""
        return sorted(self.results, key=lambda record: (self.path(record).parent, in_order(record), self.path(record)))

    def path(self, record: Record) -> Path:
        """The record's file."""
        return self._paths[id(record)]

    def show(self, record: Record, *, at: str, as_what: str) -> str:
        """The address of the record's section, seen from the top of the report. It will be there: it is shown now."""
        path = self.path(record)
        self.shown[path] = None
        self.numbers[path][at] = as_what
        return f"{page(path, self.results.root)}#{anchor(path)}"

    def relative(self, path: Path) -> str:
        """A file under the results as its place there: where the results lie is nobody's business."""
        return path.relative_to(self.results.root).as_posix()


def page(path: Path, root: Path) -> str:
    """The page that holds the record at `path`."""
    return f"records/{path.parent.relative_to(root).as_posix()}.html"


def anchor(path: Path) -> str:
    """The section of that page. Names of record files hold nothing that an address cannot (see record.py)."""
    return path.name.removesuffix(".json")


def relative_to(page_name: str, target: str) -> str:
    """`target`, an address seen from the top of the report, as a link in the page of that name."""
    place, hash_sign, section = target.partition("#")
    if place == page_name:
        return f"#{section}"
    return posixpath.relpath(place, posixpath.dirname(page_name) or ".") + hash_sign + section


def grouped(records: Iterable[Record], places: Places) -> dict[str, list[Record]]:
    """The records of every page, in their order."""
    pages: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        pages[page(places.path(record), places.results.root)].append(record)
    return dict(pages)
