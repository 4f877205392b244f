"""A small world of records, logs and pictures that holds every kind that a report shows; and a reader of its pages."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

from test_record import make_record

from ssl_bench.leaderboards.record import Record, Score, write_record
from ssl_bench.leaderboards.store import Results, load_results

NASTY = "<script>alert('x')</script> & \"q\""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)
NONE = "\u2013"
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(html.parser.HTMLParser):
    """What stands in a page, and whether every element is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        assert self.open == [], f"{path}: {self.open} are not closed"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"{self.path}: an attribute twice in {tag} {attrs}"
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[name] for name in ("href", "src") if name in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        assert tag != "script" or "src" in values, "a script in the page"
        assert not any(name.startswith("on") for name in values)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"{self.path}: </{tag}> without its beginning"
        last = self.open.pop()
        assert last == tag, f"{self.path}: <{last}> closed by </{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def scored(value: float, **changes: object) -> Record:
    return make_record(scores={"top1": Score(value=value, n=100, stderr=1.25)}, **changes)


def world(root: Path) -> Results:
    """Records of every kind that a report shows, in a results folder."""
    for name, sha, value in (("MOCA", "1", 50.0), (NASTY, "2", 61.5), ("c", "3", 40.25)):
        write_record(scored(value, model=name, weights_sha256=sha * 64), root)
    for seed, value in enumerate((52.0, 57.0)):
        write_record(scored(value, model="seeds", weights_sha256="4" * 64, seed=seed), root)
    for neighbors, value in ((5, 48.0), (40, 49.5), (80, 47.25)):
        changed = {"overrides": {"neighbors": neighbors}, "resolved_recipe": {"neighbors": neighbors}}
        write_record(scored(value, model="MOCA", weights_sha256="1" * 64, **changed), root)
    write_record(scored(99.0, model="limited", limit=5), root)
    error = {"scores": {"error": Score(value=3.0, n=5)}, "main_metric": "error", "lower_is_better": True}
    write_record(make_record(model="c", weights_sha256="3" * 64, dataset="digits", **error), root)
    error["scores"] = {"error": Score(value=2.0, n=5)}
    write_record(make_record(model="d", weights_sha256="5" * 64, dataset="digits", **error), root)
    similarity = {
        "protocol": "similarity",
        "recipe": "mmc",
        "details": {"counts": {"intra": [1, 2, 5, 9], "inter": [7, 5, 3, 1]}, "bin_edges": [-1.0, 1.0]},
    }
    write_record(scored(0.5, model="MOCA", weights_sha256="1" * 64, dataset="toy-coco", **similarity), root)
    zeroshot = {
        "protocol": "zeroshot",
        "recipe": "mmc",
        "main_metric": "miou_opt",
        "scores": {
            name: Score(value=30.0 + k, n=9, stderr=0.5)
            for k, name in enumerate(("miou_opt", "miou_t0.1", "miou_t0.2"))
        },
        "details": {"thresholds": [0.1, 0.2]},
    }
    files = {f"overlays/{k:02d}-a b#c.png": PNG for k in range(10)} | {"overlays/no.png": b"no picture"}
    record = make_record(model="MMC", weights_sha256="6" * 64, dataset="toy-coco", **zeroshot)
    write_record(record, root, files=files)
    return load_results(root)


def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def training_runs(folder: Path) -> Path:
    """Two runs of one method, one of another; one log ends in half a line."""
    for name, terms, half in (
        ("a", ("image", "local"), ""),
        ("b", ("image", "local"), '{"step": 3, "ep'),
        ("c", ("rec",), ""),
    ):
        (folder / name).mkdir(parents=True)
        lines = [
            {"step": k, "epoch": k / 2, "loss": 9.0 - k, **dict.fromkeys(terms, 1.0), "lr": 0.1, "grad_norm": 1.0}
            for k in range(1, 5)
        ] + [{"step": 4, "epoch": 2.0, "knn_cls": 33.5}]
        text = "".join(json.dumps(line) + "\n" for line in lines) + half
        (folder / name / "log.jsonl").write_text(text)
    return folder
