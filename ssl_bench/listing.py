"""What there is, as rows: `ssl-bench ls` and `ssl-bench cache ls`; and the choice among results by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import unknown

if TYPE_CHECKING:
    from ssl_bench.evaluate.cache import CacheEntry
    from ssl_bench.leaderboards.store import Results

Row = dict[str, Any]


def protocols() -> list[Row]:
    """A row a protocol: the first line of its file, its version, its recipes."""
    from ssl_bench import efficiency

    return [
        {
            "name": name,
            "version": module.VERSION,
            "what": (module.__doc__ or "").strip().splitlines()[0],
            "recipes": ", ".join(module.RECIPES),
        }
        for name, module in efficiency.protocols().items()
    ]


def methods() -> list[Row]:
    """A row a pre-training method: the first line of its file, its recipes."""
    from ssl_bench.pretrain.catalog import METHODS

    return [
        {
            "name": name,
            "what": (module.__doc__ or "").strip().splitlines()[0],
            "recipes": ", ".join(module.RECIPES),
        }
        for name, module in METHODS.items()
    ]


def recipes() -> list[Row]:
    """A row a recipe, with its source and the published result."""
    from ssl_bench import efficiency
    from ssl_bench.pretrain.catalog import METHODS

    scoring = [
        {
            "name": f"{name}/{recipe_name}",
            "selected_on": recipe.selected_on,
            "source": recipe.source,
            "published": recipe.published,
        }
        for name, module in efficiency.protocols().items()
        for recipe_name, recipe in module.RECIPES.items()
    ]
    training = [
        {"name": f"{name}/{recipe_name}", "selected_on": "", "source": recipe.source, "published": recipe.published}
        for name, module in METHODS.items()
        for recipe_name, recipe in module.RECIPES.items()
    ]
    return scoring + training


def datasets() -> list[Row]:
    """A row a dataset that is known by name, with all kinds in which protocols read it."""
    from ssl_bench.evaluate.datasets import KINDS, named_places
    from ssl_bench.evaluate.splits import BUILT_IN

    rows: dict[str, Row] = {}
    for kind, known in KINDS.items():
        for name, what in known.names.items():
            if name in rows:
                rows[name]["kind"] += f", {kind}"
                continue
            places = named_places(name)
            place = next((place for place in places if place.exists()), places[0])
            rows[name] = {
                "name": name,
                "kind": kind,
                "what": what,
                "where": "built in" if name in BUILT_IN else str(place),
                "here": name in BUILT_IN or place.exists(),
            }
    return list(rows.values())


def tables() -> list[Row]:
    """A row a table of a paper: what its numbers need, and whether the data for all of them are here."""
    from ssl_bench.leaderboards import tables as papers
    from ssl_bench.reproducing import known_here

    listed = []
    for name, paper, number in papers.names():
        table, lines = papers.find(name), papers.rows(paper, number)
        printed = [
            (column, line.cells[column.name]) for line in lines for column in table.columns if column.name in line.cells
        ]
        ways = [column.measure_of(cell) for column, cell in printed]
        measures = [way for way in ways if not isinstance(way, str)]
        trained = [pretraining.recipe for _, cell in printed if (pretraining := table.pretraining_of(cell))]
        datasets = list(dict.fromkeys(measure.dataset for measure in measures if measure.dataset))
        found = {dataset: known_here(dataset) for dataset in datasets}
        absent = [f"no {dataset} in {places[0]}" for dataset, (here, places) in found.items() if not here]
        wants_gpu = any(_wants_gpu(measure.recipe) for measure in measures) and not _has_gpu()
        absent += ["wants a GPU"] if wants_gpu else []
        never = Counter(way for way in ways if isinstance(way, str))
        listed.append(
            {
                "name": name,
                "title": table.title,
                "numbers": len(printed),
                "runs": list(dict.fromkeys(measure.recipe for measure in measures)),
                "datasets": datasets,
                "pretraining": list(dict.fromkeys(trained)),
                "here": not absent and bool(measures),
                "why_not": [*absent, *(f"{count} of {len(printed)}: {text}" for text, count in never.items())],
            }
        )
    return listed


def _wants_gpu(recipe: str) -> bool:
    from ssl_bench import efficiency

    protocol, _, name = recipe.partition("/")
    return protocol == efficiency.NAME and efficiency.RECIPES[name].processes is not None


def _has_gpu() -> bool:
    """Without asking torch, which takes seconds to import."""
    return any(True for name in ("nvidia[0-9]*", "dxg", "kfd") for _ in Path("/dev").glob(name))


def result_row(row: Row) -> Row:
    """What fits a terminal of `results`: of the rest what is not usual."""
    usual = {"settings": "", "limited": False, "seed": 0, "dtype": "fp32"}
    return {
        "name": f"{row['name']}@v{row['version']}",
        "metric": row["metric"],
        "value": row["value"],
        "unusual": ", ".join(
            str(row[name]) if name in ("settings", "dtype") else f"{name} {row[name]}".removesuffix(" True")
            for name, plain in usual.items()
            if row[name] != plain
        )
        or "-",
        "started": row["started"][:16].replace("T", " "),
    }


def table_row(row: Row) -> Row:
    """What fits a terminal of `tables`; `--json` has the rest."""
    on = f" on {', '.join(row['datasets'])}" if row["datasets"] else ""
    return {
        "name": row["name"],
        "title": row["title"],
        "needs": ", ".join(row["runs"]) + on,
        "pre-training": len(row["pretraining"]) or "-",
        "missing": "; ".join(row["why_not"]) or "-",
    }


def results() -> list[Row]:
    """A row a record."""
    from ssl_bench.leaderboards.record import settings_text
    from ssl_bench.leaderboards.store import load_results

    return [
        {
            "name": f"{record.model}/{record.dataset}/{record.protocol}/{record.recipe}",
            "version": record.version,
            "settings": settings_text(record.overrides),
            "metric": record.main_metric,
            "value": record.main_score.value,
            "limited": record.limited,
            "seed": record.seed,
            "dtype": record.dtype,
            "started": record.started,
        }
        for record in load_results().records
    ]


def cache_row(entry: CacheEntry) -> Row:
    """What a person looks for in the cache, narrow enough for a terminal; `--json` has the rest."""
    return {
        "key": entry.key[:12],
        "model": entry.model,
        "split": entry.split,
        "reading": entry.reading,
        "images": f"{entry.images:,}" if entry.complete else f"{entry.images:,} (part)",
        "MiB": f"{entry.bytes / 2**20:.1f}",
        "unused days": f"{entry.unused_days:.1f}",
    }


def fitting(results: Results, *, dataset: str | None, protocol: str | None) -> Results:
    """The results of a dataset and a protocol. A name that no record has is an error, with the names that they have."""
    of_dataset = results.filter(dataset=dataset)
    if dataset is not None and results and not of_dataset:
        raise unknown("dataset", dataset, {record.dataset for record in results})
    chosen = of_dataset.filter(protocol=protocol)
    if protocol is not None and of_dataset and not chosen:
        where = "" if dataset is None else f" on {dataset}"
        raise unknown(f"protocol{where}", protocol, {record.protocol for record in of_dataset})
    return chosen


# What a terminal shows of a kind, where its rows are long.
SHORT: dict[str, Callable[[Row], Row]] = {"tables": table_row, "results": result_row}

KINDS: dict[str, Callable[[], list[Row]]] = {
    "methods": methods,
    "protocols": protocols,
    "recipes": recipes,
    "datasets": datasets,
    "tables": tables,
    "results": results,
}
