"""A static report: one folder of HTML that opens from a disk, without a server, without anything from outside.

    index.html            leaderboards, one a dataset
    papers.html           the papers' numbers against ours; paper-{name}.html: every table
    curves.html           learning curves of pre-training, numbers against settings
    pictures.html         similarity histograms, overlays
    records.html          every run; records/{model}/{weights}/{dataset}.html: all that a record says
    leaderboards/*.csv, records.csv       everything, also what is too much for a page

Every score links to its record, and every record to where its scores are shown; learning curves name their logs. The
same records give the same bytes: there is no time in it but the records' own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.files import explained
from ssl_bench.leaderboards.report import ablations, boards, charts, curves, paper_pages, pictures, provenance, words
from ssl_bench.leaderboards.report.places import Places, relative_to
from ssl_bench.leaderboards.store import Results

MANIFEST = "report-files.txt"
_HERE = Path(__file__).parent
_ASSETS = ("style.css", "sort.js")


def build(results: Results, out: Path, runs: Sequence[Path] = ()) -> Path:
    """Write the report into `out`, in the place of an older report, and return its first page."""
    place = Path(os.path.realpath(out))  # of a link, what it leads to
    with _refusals(out):
        _require_ours(out, place, results.root)
    if not any(not record.limited for record in results):
        from ssl_bench.leaderboards.table import leaderboard

        leaderboard(results)  # which says what to run
    logs = curves.read_logs(runs, results)
    with _refusals(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=".report.", suffix=".part", dir=place.parent)
    try:
        folder = Path(beside) / "new"
        with explained(out):
            _Writer(folder, Places(results)).write(logs)
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            (folder / MANIFEST).write_text("".join(f"{name}\n" for name in [*names, MANIFEST]), "utf-8")
        with _refusals(out):
            _put(folder, place, Path(beside) / "old")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out / "index.html"


@contextlib.contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """What the system will not do at that place is the user's to know."""
    try:
        with explained(out):
            yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}). Name another folder.") from error


def _require_ours(out: Path, place: Path, results: Path) -> None:
    """Only what a report wrote is ever replaced."""
    if Path.cwd().is_relative_to(place):
        raise UserError(
            f"--out {out}: expected a folder of its own, found the current one, or one above it, which cannot be "
            "replaced. Name a new folder in it: --out report."
        )
    if place.is_relative_to(os.path.realpath(results)):
        raise UserError(f"--out {out}: expected a folder outside the results, found one in {results}. Name another.")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    manifest = place / MANIFEST
    known = set(manifest.read_text("utf-8", errors="replace").splitlines()) if manifest.is_file() else set()
    paths = [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
    files = sorted(path.relative_to(place).as_posix() for path in paths)
    foreign = [name for name in files if name not in known] if place.is_dir() else [f"the file {place.name}"]
    if foreign or not known:
        raise UserError(
            f"--out {out}: expected a new folder or an older report, found {(foreign or ['folders'])[0]}, "
            "which no report wrote. "
            "Name another folder; nothing was changed."
        )


def _put(new: Path, place: Path, aside: Path) -> None:
    """The older report steps aside, and comes back if the new one cannot take its place."""
    try:
        if place.exists():
            place.rename(aside)
        new.rename(place)
    except BaseException:
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise


class _Writer:
    """Renders templates into files."""

    def __init__(self, folder: Path, places: Places) -> None:
        import jinja2

        self.folder, self.places = folder, places
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters["number"] = words.number
        self.environment.globals.update(swatch=charts.swatch, plural=words.plural, version=ssl_bench.__version__)

    def write(self, logs: Sequence[curves.TrainingLog]) -> None:
        """All pages. Those with numbers come before the records, which link back to them."""
        places = self.places
        self.folder.mkdir()
        for name in _ASSETS:
            shutil.copyfile(_HERE / name, self.folder / name)
        bad, more_bad = provenance.problems(places)
        found, left_out = boards.boards(places)
        for board in found:
            self.text(board.csv, board.csv_text)
        overview = {
            "records": len(places.results),
            "models": len({(record.model, record.weights_sha256) for record in places.results}),
            "datasets": len({record.dataset for record in places.results}),
            "problems": len(places.results.problems),
        }
        terms = [*words.glossary({record.protocol for record in places.results}), *words.TERMS]
        self.page("index.html", "index", boards=found, left_out=left_out, overview=overview, terms=terms)
        self._papers()
        self._curves(logs)
        self._pictures()
        pages = provenance.pages(places)
        for page in pages:
            self.page(page.name, "record", page=page)
        lines, left = provenance.listing(places)
        self.page("records.html", "records", lines=lines, left_out=left, problems=bad, more_problems=more_bad)
        frame = places.results.to_dataframe()
        frame["path"] = [places.relative(Path(path)) for path in frame["path"]]
        self.text("records.csv", frame.to_csv(index=False, lineterminator="\n"))

    def _papers(self) -> None:
        found = paper_pages.papers(self.places)
        for paper in found.papers:
            self.page(paper.page, "paper", paper=paper)
        self.page("papers.html", "papers", found=found)

    def _curves(self, logs: Sequence[curves.TrainingLog]) -> None:
        learning, remarks = curves.charts(logs)
        settings, more = ablations.of_records(self.places)
        drawn = {"learning": learning, "settings": settings, "monitored": curves.has_accuracy(logs)}
        self.page("curves.html", "curves", left_out=[*remarks, *more], **drawn)

    def _pictures(self) -> None:
        histograms, left_histograms = pictures.histograms(self.places)
        thresholds, left_thresholds = pictures.threshold_curves(self.places)
        galleries, left_galleries = pictures.galleries(self.places)
        for picture in (picture for gallery in galleries for picture in gallery.pictures):
            target = self.folder / picture.target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture.source, target)
        left_out = [*left_histograms, *left_thresholds, *left_galleries]
        drawn = {"histograms": histograms, "thresholds": thresholds, "galleries": galleries}
        self.page("pictures.html", "pictures", left_out=left_out, **drawn)

    def page(self, name: str, template: str, **content: Any) -> None:
        """One page; in templates, `to(address)` is the link to an address seen from the top of the report."""

        def to(target: str) -> str:
            return relative_to(name, target)

        text = self.environment.get_template(f"{template}.html.jinja").render(to=to, here=name, **content)
        self.text(name, text.rstrip("\n") + "\n")

    def text(self, name: str, text: str) -> None:
        """A file, in folders of its own."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
