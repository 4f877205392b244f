"""Zero-shot segmentation against the whole protocol written again, slowly: pixel by pixel, threshold by threshold."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from test_coco import annotation, write
from test_object_masks import run_lengths
from test_patch_views import PatchMean, by_counting, scenes, subject, token_image

from ssl_bench.errors import UserError
from ssl_bench.evaluate.backbone import Output, Pixels, Tokens
from ssl_bench.evaluate.object_masks import IGNORE, ObjectMasks, open_objects
from ssl_bench.evaluate.pictures import sheet
from ssl_bench.protocols import patch_views, zeroshot
from ssl_bench.protocols.patch_views import Read, token_images
from ssl_bench.protocols.zeroshot import RECIPES, class_mean, run, sweep

TOY = RECIPES["toy"]


@pytest.fixture(autouse=True)
def _nothing_drawn(monkeypatch):
    monkeypatch.setattr(zeroshot, "_OVERLAYS", 0)


def recipe(**changes):
    return dataclasses.replace(TOY, **{"image_px": 24, "interpolation": "bilinear"} | changes)


# The sweep ---------------------------------------------------------------------------------------------------------


def looped(similarity, target, counted, thresholds):
    """One pass over everything for every threshold."""
    shared, union = (np.zeros((len(similarity), len(thresholds))) for _ in range(2))
    for k, threshold in enumerate(thresholds):
        for p in range(len(similarity)):
            for n in range(similarity.shape[1]):
                inside = bool(torch.tensor(similarity[p, n]) > threshold)  # torch compares float32 in float32
                shared[p, k] += target[p, n] if inside else 0
                union[p, k] += counted[n] if inside else target[p, n]
    return shared, union


@pytest.mark.parametrize("thresholds", [TOY.thresholds, (0.3,), (-1.0, -0.25, 0.15, 0.9), (-math.inf, 0.1, 0.2)])
def test_the_sweep_is_the_loop_also_exactly_on_thresholds(thresholds):
    rng = np.random.RandomState(1)
    similarity = rng.uniform(-1, 1, (5, 60)).astype(np.float32)
    ties = np.float32([k / 10 for k in range(-10, 11)])
    similarity[:2, :21] = ties
    similarity[2, :21] = np.nextafter(ties, np.float32(2))
    similarity[3, :21] = np.nextafter(ties, np.float32(-2))
    similarity[4, :10] = np.float32(np.arange(0, 1, 0.1))  # .30000000000000004 and the like
    counted = rng.randint(0, 7, 60).astype(float)
    target = np.minimum(rng.randint(0, 7, (5, 60)), counted)
    for found, expected in zip(
        sweep(similarity, target, counted, thresholds), looped(similarity, target, counted, thresholds), strict=True
    ):
        assert np.array_equal(found, expected)


def test_what_lies_on_a_threshold_is_outside():
    for k in range(10):
        on = np.float32([[k / 10]])
        assert sweep(on, np.ones((1, 1)), np.ones(1), [k / 10])[0].item() == 0
        assert sweep(np.nextafter(on, np.float32(2)), np.ones((1, 1)), np.ones(1), [k / 10])[0].item() == 1


def test_no_prompts_no_counts():
    empty = np.zeros((0, 4), np.float32)
    shared, union = sweep(empty, empty.astype(float), np.ones(4), (0.1, 0.2))
    assert shared.shape == union.shape == (0, 2)


# The whole ---------------------------------------------------------------------------------------------------------


def of_class(areas, categories):
    """The object that covers most of a token within the category that does; or n and n + 1."""
    n, sums = len(categories), {}
    for area, kind in zip(areas, [*categories, "none", "ignored"], strict=True):
        sums[kind] = sums.get(kind, 0) + area
    best = max(sums, key=sums.get)
    if best in ("none", "ignored"):
        return n + (best == "ignored")
    return max((k for k in range(n) if categories[k] == best), key=lambda k: areas[k])


def by_hand(root, settings, seed=0, patch=4):
    """(category, IoU at every threshold, IoU of everything, of the prompt alone) of every prompt; counts."""
    document = json.loads((root / "annotations/instances_val2017.json").read_text())
    ids = sorted(each["id"] for each in document["categories"])
    grid, found, small = settings.image_px // patch, [], 0
    for entry in sorted(document["images"], key=lambda each: each["file_name"]):
        with Image.open(root / "val2017" / entry["file_name"]) as opened:
            square = opened.convert("RGB").resize((settings.image_px,) * 2, Image.Resampling.BILINEAR)
        pixels = np.asarray(square) / 255 * 2 - 1
        tokens = [
            pixels[r * patch : r * patch + patch, c * patch : c * patch + patch].mean(axis=(0, 1))
            for r in range(grid)
            for c in range(grid)
        ]
        unit = np.array([token / np.linalg.norm(token) for token in tokens])
        mine = sorted((b for b in document["annotations"] if b["image_id"] == entry["id"]), key=lambda b: b["id"])
        objects = [box for box in mine if not box["iscrowd"]]
        numbers = np.zeros((entry["height"], entry["width"]), int)
        for box in [b for b in mine if b["iscrowd"]] + sorted(objects, key=lambda b: (-b["area"], b["id"])):
            runs, flat = box["segmentation"]["counts"], []
            for position, length in enumerate(runs):
                flat += [position % 2 == 1] * length
            mask = np.array(flat, bool).reshape(entry["width"], entry["height"]).T
            numbers[mask] = IGNORE if box["iscrowd"] else 1 + objects.index(box)
        areas = by_counting(numbers.astype(np.uint16), len(objects), grid)
        label = [int(np.argmax(areas[:, token])) for token in range(grid * grid)]
        if settings.target == "class":
            label = [of_class(areas[:, token], [box["category_id"] for box in objects]) for token in range(grid * grid)]
        for place, box in enumerate(objects):
            own = [token for token in range(grid * grid) if label[token] == place]
            if not own:
                small += 1
                continue
            said = f"token of an object, seed {seed}: {entry['file_name']} {box['id']}".encode()
            prompt = own[int.from_bytes(hashlib.sha256(said).digest()[:8], "big") % len(own)]
            similar = (unit[prompt] @ unit.T).astype(np.float32)
            wanted = [
                k
                for k, each in enumerate(objects)
                if k == place or (settings.target == "class" and each["category_id"] == box["category_id"])
            ]

            def iou(selected, wanted=wanted, areas=areas, label=label, objects=objects):
                if settings.resolution == "token":
                    target = {t for t in range(grid * grid) if label[t] in wanted}
                    chosen = {t for t in selected if label[t] != len(objects) + 1}
                    return len(target & chosen) / len(target | chosen)
                inside = sum(areas[k, t] for k in wanted for t in selected)
                outside = sum(areas[: len(objects) + 1, t].sum() for t in selected) - inside
                return inside / (sum(areas[k].sum() for k in wanted) + outside)

            values = [iou([t for t in range(grid * grid) if similar[t] > np.float32(T)]) for T in settings.thresholds]
            everything, alone = iou(range(grid * grid)), iou([prompt])
            found.append((ids.index(box["category_id"]), values, everything, alone))
    return found, small


@pytest.mark.parametrize("target", ["class", "instance"])
@pytest.mark.parametrize("resolution", ["token", "pixel"])
def test_scores_are_those_by_hand(target, resolution, tmp_path):
    root = scenes(tmp_path)
    settings = recipe(target=target, resolution=resolution)
    expected, small = by_hand(root, settings, seed=4)
    scores = run(subject(root, seed=4), settings)
    assert small > 0
    counts = {"prompts": len(expected), "images": 6, "images_without_objects": 1, "objects": 20, "crowds": 5}
    counts |= {"objects_without_token": small, "broken": 0, "objects_without_outline": 0}
    assert {name: scores.details[name] for name in counts} == counts
    assert len(expected) + small == 20
    labels = np.array([each[0] for each in expected])

    def over_classes(values):
        return float(np.mean([100 * np.mean(np.array(values)[labels == label]) for label in set(labels.tolist())]))

    columns = np.array([each[1] for each in expected]).T
    for threshold, column in zip(settings.thresholds, columns, strict=True):
        assert scores.metrics[f"miou_t{threshold:g}"].value == pytest.approx(over_classes(column), abs=1e-9)
        assert scores.metrics[f"iou_t{threshold:g}"].value == pytest.approx(100 * column.mean(), abs=1e-9)
    classes, prompts = [over_classes(column) for column in columns], [100 * column.mean() for column in columns]
    assert scores.metrics["miou_opt"].value == pytest.approx(max(classes))
    assert scores.metrics["iou_opt"].value == pytest.approx(max(prompts))
    assert scores.details["best_threshold"] == {
        "miou": settings.thresholds[int(np.argmax(classes))],
        "iou": settings.thresholds[int(np.argmax(prompts))],
    }
    assert scores.metrics["miou_everything"].value == pytest.approx(over_classes([each[2] for each in expected]))
    assert scores.metrics["miou_prompt_alone"].value == pytest.approx(over_classes([each[3] for each in expected]))
    best = columns[int(np.argmax(prompts))]
    error = 100 * np.std(best, ddof=1) / math.sqrt(len(best))
    assert (scores.metrics["iou_opt"].n, scores.metrics["iou_opt"].stderr) == (len(best), pytest.approx(error))
    for label in set(labels.tolist()):
        told = scores.details["categories"][f"kind {(2, 5, 7)[label]}"]
        assert told["prompts"] == (labels == label).sum()
        assert told["iou"] == pytest.approx(100 * columns[:, labels == label].mean(axis=1), abs=1e-4)
    assert scores.main == "miou_opt"
    assert (scores.evaluated, scores.skipped) == ({"val": 6}, {"val": 0})


def test_each_mean_has_its_own_optimum(tmp_path):
    iou = np.array([[0.9, 0.5], [0.9, 0.5], [0.9, 0.5], [0.1, 0.8]])
    found = zeroshot.Found(np.array([0, 0, 0, 1]), iou, np.zeros(4), np.zeros(4))
    settings, one = recipe(thresholds=(0.1, 0.2)), subject(scenes(tmp_path))
    scores = zeroshot._scores(one, settings, found, Read(), zeroshot._Gallery(6, 0))
    values = {name: score.value for name, score in scores.metrics.items()}
    assert (values["miou_t0.1"], values["miou_t0.2"]) == (pytest.approx(50), pytest.approx(65))
    assert (values["iou_t0.1"], values["iou_t0.2"]) == (pytest.approx(70), pytest.approx(57.5))
    assert (values["miou_opt"], values["iou_opt"]) == (values["miou_t0.2"], values["iou_t0.1"])
    assert scores.details["best_threshold"] == {"miou": 0.2, "iou": 0.1}
    assert scores.details["categories_without_prompt"] == 1


def test_instances_classes_pixels_and_seeds_give_different_scores(tmp_path):
    root = scenes(tmp_path)
    values = [
        run(subject(root, seed=seed), recipe(**changes)).metrics["miou_opt"].value
        for seed, changes in ((0, {}), (1, {}), (0, {"target": "instance"}), (0, {"resolution": "pixel"}))
    ]
    values.append(run(subject(root), recipe(norm=False)).metrics["miou_opt"].value)
    assert len(set(values)) == 5


class Oracle(torch.nn.Module):
    """Knows its images by heart: the token of a patch is a direction of its own for every object, or category."""

    architecture = dataclasses.replace(PatchMean.architecture, patch_px=8)

    def __init__(self, data, settings, told):
        super().__init__()
        self.known = {}
        one = subject(data, SimpleNamespace(architecture=self.architecture))
        for image in patch_views._Images(one, settings):
            names = [*(image.categories if told == "category" else range(len(image.ids))), 50, 51]
            directions = torch.eye(60)[torch.tensor(names)[torch.from_numpy(image.label)]]
            self.known[image.pixels.tobytes()] = directions

    def forward(self, images, *, layers, norm):
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        grid = images.shape[-1] // 8
        tokens = [self.known[each.numpy().tobytes()].reshape(grid, grid, -1) for each in pixels]
        return Output((Tokens(None, torch.stack(tokens)),))


@pytest.mark.parametrize(("target", "told"), [("class", "category"), ("instance", "object")])
def test_an_oracle_scores_100_at_token_resolution_and_a_random_network_clearly_less(target, told):
    data = open_objects("toy-coco").limited(60)
    settings = dataclasses.replace(TOY, target=target)
    scores = run(subject(data, Oracle(data, settings, told)), settings)
    for threshold in settings.thresholds:
        assert scores.metrics[f"miou_t{threshold:g}"].value == scores.metrics[f"iou_t{threshold:g}"].value == 100
    assert scores.metrics["miou_opt"].stderr == 0
    assert run(subject(data, tiny_backbone()), settings).metrics["miou_opt"].value < 40
    wrong = "object" if told == "category" else "category"
    assert run(subject(data, Oracle(data, settings, wrong)), settings).metrics["miou_opt"].value < 99


def test_an_oracle_at_pixel_resolution_has_the_bound_of_the_grid():
    """Its segments are the tokens that the class covers most of: no rectangle of the grid fits an outline."""
    data = open_objects("toy-voc").limited(30)
    settings = dataclasses.replace(TOY, resolution="pixel")
    one = subject(data, Oracle(data, settings, "category"))
    iou = {}
    for index in range(30):
        seen = data.objects("val", index)
        areas = by_counting(seen.numbers, len(seen.ids), 30)
        label = areas.argmax(axis=0)
        for place, category in enumerate(seen.categories):
            own = label == place
            if own.any():
                shared = areas[place, own].sum()
                iou.setdefault(category, []).append(shared / (areas[place].sum() + areas[:-1, own].sum() - shared))
    expected = 100 * np.mean([np.mean(values) for values in iou.values()])
    assert 60 < expected < 95
    assert run(one, settings).metrics["miou_opt"].value == pytest.approx(expected, abs=1e-9)


# Errors of means ---------------------------------------------------------------------------------------------------


def test_the_mean_over_classes_and_its_standard_error():
    rng = np.random.RandomState(0)
    category = np.repeat([0, 3, 4], [40, 10, 5])
    centers, spread = np.array([0.2, 0, 0, 0.5, 0.8])[category], np.array([0.1, 0, 0, 0.05, 0.2])[category]
    means = [class_mean(centers + spread * rng.randn(55), category) for _ in range(4000)]
    assert np.mean([each.value for each in means]) == pytest.approx(50, abs=0.2)
    assert np.mean([each.stderr**2 for each in means]) == pytest.approx(np.var([e.value for e in means]), rel=0.06)
    assert means[0].n == 55


def test_a_class_with_one_prompt_has_the_others_variance():
    values, category = np.array([0.1, 0.3, 0.6, 0.8, 0.9]), np.array([0, 0, 1, 1, 2])
    found = class_mean(values, category)
    assert found.value == pytest.approx(100 * (0.2 + 0.7 + 0.9) / 3)
    assert found.stderr == pytest.approx(100 * math.sqrt(0.02 / 2 + 0.02 / 2 + 0.02) / 3)
    assert class_mean(values[[0, 2, 4]], category[[0, 2, 4]]).stderr is None


# How it is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [{"batch_size": 4}, {"batch_size": 1}, {"workers": 1}])
def test_neither_batch_size_nor_workers_change_the_scores(effort, tmp_path):
    root = scenes(tmp_path)
    plain, other = (run(subject(root, tiny_backbone(), **each), recipe()) for each in ({}, effort))
    assert {name: score.value for name, score in plain.metrics.items()} == pytest.approx(
        {name: score.value for name, score in other.metrics.items()}
    )


def test_a_prompt_is_the_same_in_a_limited_run(tmp_path):
    data = open_objects(str(scenes(tmp_path)))
    whole, part = (
        [image.drawn(k, 0) for image in token_images(subject(each), recipe(), Read()) for k in range(len(image.ids))]
        for each in (data, data.limited(2))
    )
    assert part == whole[: len(part)]
    assert len(part) == 8


def test_broken_images_are_refused_or_counted(tmp_path):
    root = scenes(tmp_path)
    (root / "val2017" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png.*--skip-broken"):
        run(subject(root), recipe())
    scores = run(subject(root, skip_broken=True), recipe())
    assert (scores.evaluated, scores.skipped, scores.details["broken"]) == ({"val": 5}, {"val": 1}, 1)
    assert (scores.details["objects"], scores.details["crowds"]) == (16, 4)  # not those of the broken one
    for k in range(6):
        (root / "val2017" / f"{k}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not one of 6 images"):
        run(subject(root, skip_broken=True), recipe())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_annotations_come_out_of_workers_as_they_are(workers, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("the outline of annotation 1 cannot be filled")

    monkeypatch.setattr(ObjectMasks, "objects", refuse)
    with pytest.raises(UserError, match=r"^the outline of annotation 1 cannot be filled$"):
        run(subject(scenes(tmp_path), workers=workers, skip_broken=True), recipe())


def test_tokens_that_are_not_finite_are_refused(tmp_path):
    network = tiny_backbone()
    with torch.no_grad():
        network.vit.norm.bias[0] = math.nan
    with pytest.raises(UserError, match=r"patch tokens of 0\.png are not finite"):
        run(subject(scenes(tmp_path), network), recipe())


def test_objects_smaller_than_a_patch_alone_are_no_result(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[3, 3] = True
    boxes = [annotation(1, 1, 4, [3, 3, 1, 1], segmentation=run_lengths(mask), area=1.0)]
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    write(tmp_path, {"images": [image], "annotations": boxes, "categories": [{"id": 4, "name": "cat"}]})
    with pytest.raises(UserError, match=r"no object in 1 images can be prompted: of 1 objects none.*image_px=24"):
        run(subject(tmp_path), recipe())


# Pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broken", "expected"), [((), [0, 2, 5]), ((0, 1), [2, 3, 5])])
def test_pictures_are_evenly_spaced_over_the_split_also_where_images_are_broken(
    broken, expected, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(zeroshot._Shown, "picture", lambda shown, *_: drawn.append(shown.image.place) or b"")
    root = scenes(tmp_path)
    for number in broken:
        (root / "val2017" / f"{number}.png").write_bytes(b"no image")
    monkeypatch.setattr(zeroshot, "_OVERLAYS", 3)
    run(subject(root, skip_broken=True), recipe())
    assert drawn == expected


def overlays(count, one, settings, monkeypatch):
    monkeypatch.setattr(zeroshot, "_OVERLAYS", count)
    return run(one, settings).files


def test_pictures_can_be_opened(tmp_path, monkeypatch):
    files = overlays(3, subject(scenes(tmp_path)), recipe(), monkeypatch)
    assert [name[:11] for name in files] == ["overlays/00", "overlays/01", "overlays/02"]
    assert all(name.endswith(("-kind-2.png", "-kind-5.png", "-kind-7.png")) for name in files)
    for content in files.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
            assert picture.width > 4 * 240
    assert overlays(0, subject(scenes(tmp_path)), recipe(), monkeypatch) == {}
    assert len(overlays(100, subject(scenes(tmp_path)), recipe(), monkeypatch)) == 5  # one image has no objects


@pytest.mark.parametrize("resolution", ["token", "pixel"])
def test_pictures_show_what_was_scored_and_say_of_what(resolution, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        sheet, "sheet", lambda title, rows, **more: sheets.append((title, rows, more)) or Image.new("1", (1, 1))
    )
    one, settings = subject(scenes(tmp_path)), recipe(resolution=resolution)
    overlays(1, one, settings, monkeypatch)
    ((title, (row,), more),) = sheets
    image = next(token_images(one, settings, Read()))
    first = next(k for k in range(len(image.ids)) if image.drawn(k, 0) is not None)
    names = ("kind 2", "kind 5", "kind 7")
    assert title == f"{names[image.categories[first]]} in 0.png"
    for part in ("fake on ", "patches of 4 px in 24 px", "best mIoU over all 6 images, not over this one"):
        assert part in more["note"]
    same = [k for k in range(len(image.ids)) if image.categories[k] == image.categories[first]]
    if resolution == "token":
        target, ignored = np.isin(image.label, same), image.label == len(image.ids) + 1
    else:
        shares = image.areas / image.areas.sum(axis=0)
        target, ignored = shares[same].sum(axis=0) >= 0.5, shares[-1] > 0.5
    prompt = image.drawn(first, 0)
    drawn = np.asarray(row.cells[1].picture).astype(int)
    side = drawn.shape[0] / 6
    assert target.any()
    assert ignored.any()
    for token in set(range(36)) - {prompt}:
        y, x = (int((place + 0.5) * side) for place in divmod(token, 6))
        red, green, blue = drawn[y, x]
        assert (blue > red + 20) == (target[token] and not ignored[token])  # sky
        assert (red == green == blue) == (not target[token] or ignored[token])
        assert not ignored[token] or red < 0.4 * 255 + 0.6 * 40 + 1


def test_the_target_is_drawn_where_it_covers_half_of_a_patch():
    numbers = np.zeros((20, 20), np.uint16)
    numbers[:10, :6], numbers[:10, 10:14], numbers[10:, 4:10] = 1, 1, IGNORE  # 60 %, 40 %, 60 % ignored
    image = token_image(numbers, (5,), (0,), 2, torch.eye(4), by_class=True)
    prompts = zeroshot.prompts_of(image, recipe(resolution="pixel"), 0)
    gallery = zeroshot._Gallery(1, 1)
    gallery.offer(image, prompts, np.eye(4, dtype=np.float32)[:1], np.zeros((1, 10)))
    assert gallery.kept[0].target.tolist() == [True, False, False, False]
    assert gallery.kept[0].ignored.tolist() == [False, False, True, False]


# Recipes and refusals ----------------------------------------------------------------------------------------------


# Typed again from MMC's Table 1: T = .1, .2, .3, .4, best.
TABLE_1 = {
    "RAND (a random network)": "16.8 16.6 16.2 15.5 16.8",
    "SiT": "32.9 35.3 34.7 31.6 35.3",
    "DINO": "33.3 35.1 33.0 28.2 35.1",
    "iBOT": "33.5 36.2 36.2 34.1 36.2",
    "MC-SSL": "31.9 34.2 35.0 35.1 35.1",
    "MAE": "28.6 30.1 26.0 18.5 30.1",
    "MSN": "32.7 34.4 31.6 25.9 34.4",
    "MMC": "34.6 37.6 38.4 37.9 38.4",
}


def test_recipes_are_what_their_sources_say():
    mmc = RECIPES["mmc"]
    assert next(iter(RECIPES)) == "mmc"
    assert mmc.image_px // 16 == 30
    assert mmc.image_px == 480
    assert mmc.thresholds == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    for method, row in TABLE_1.items():
        assert f"{method} {' / '.join(row.split())}" in mmc.published
    for row in RECIPES.values():  # ours: another value is another VERSION
        assert (row.layer, row.norm, row.interpolation) == (-1, True, "bicubic")
        assert (row.target, row.resolution, row.selected_on) == ("class", "token", "test")
    assert TOY.image_px // 8 == 30
    assert dataclasses.replace(mmc, thresholds=(0.3,)).selected_on == "none"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thresholds": (0.1, 1.0)}, "cosines from -1 to below 1"),
        ({"thresholds": (0.2, 0.1)}, "larger than the one before"),
        ({"thresholds": (0.1, 0.1)}, "larger than the one before"),
        ({"thresholds": (0.1234561, 0.1234564)}, "two have one name"),
        ({"image_px": 0}, "image_px=0"),
        ({"image_px": 8193}, "image_px=8193: expected a size in pixels up to 8192"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        recipe(**change)


def test_what_does_not_fit_is_refused_before_any_image_is_read(tmp_path):
    one = subject(scenes(tmp_path))
    zeroshot.check(one, recipe())
    with pytest.raises(
        UserError, match=r"image_px=30 does not divide into patches of 4 px.*image_px=28 or.*image_px=32"
    ):
        zeroshot.check(one, recipe(image_px=30))
    with pytest.raises(UserError, match=r"image_px=3 does.*image_px=4 or.*image_px=8"):
        zeroshot.check(one, recipe(image_px=3))
    with pytest.raises(UserError, match=r"block 5 does not exist.*layer=-1"):
        zeroshot.check(one, recipe(layer=5))
    network = SimpleNamespace(architecture=dataclasses.replace(PatchMean.architecture, final_norm=False))
    with pytest.raises(UserError, match=r"zeroshot cannot be run so.*no final norm.*norm=false"):
        zeroshot.check(subject(one.dataset, network), recipe())
    with pytest.raises(UserError, match=r"target=instance: the masks of toy-voc tell classes"):
        zeroshot.check(subject(open_objects("toy-voc")), recipe(target="instance"))
    with pytest.raises(UserError, match="no images"):
        zeroshot.check(subject(one.dataset.limited(0)), recipe())
    zeroshot.check(subject(one.dataset, Pixels()), recipe())
    assert zeroshot.readings(one, recipe()) == {}
