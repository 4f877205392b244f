"""Locality against the whole protocol written again, slowly: boxes counted pixel by pixel, crops averaged by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_backbone
from PIL import Image
from test_coco import annotation, write

import ssl_bench
from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import HALF, Architecture
from ssl_bench.evaluate.backbone import Output, Pixels, Tokens
from ssl_bench.evaluate.coco import open_coco
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols import locality
from ssl_bench.protocols.locality import RECIPES, choose_targets, draw_gallery, overlap, ratio, retrieve, run

TOY = RECIPES["toy"]


class MeanColor(torch.nn.Module):
    """A network whose class token is the mean color of what it sees."""

    architecture = Architecture(dim=3, depth=1, heads=1, patch_px=4, image_px=16, mlp_dim=0, mean=HALF, std=HALF)

    def forward(self, images, *, layers, norm):
        cls = images.mean(dim=(2, 3))
        return Output(tuple(Tokens(cls, images.permute(0, 2, 3, 1)) for _ in layers))

    def normalized(self, tokens):
        return tokens


def subject(root, network=None, *, seed=0, **effort) -> Subject:
    network = network or MeanColor()
    checkpoint = SimpleNamespace(
        backbone=network, architecture=network.architecture, name="fake", spec="fake.pt", format="fake"
    )
    dataset = root if not hasattr(root, "joinpath") else open_coco(str(root))
    return Subject(checkpoint, dataset, Effort(**effort), seed)


def scenes(root, *, images=8, background=(40, 160, 90), size=(64, 48)):
    """Images with one red square of 24 px each, of category 4, and one blue bar, of category 9."""
    rng = np.random.RandomState(0)
    entries, annotations = [], []
    for index in range(images):
        x, y = rng.randint(0, 40), rng.randint(0, 24)
        entries.append({"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]})
        annotations.append(annotation(2 * index + 1, index, 4, [int(x), int(y), 24, 24]))
        annotations.append(annotation(2 * index + 2, index, 9, [0.5, 40.5, 40.25, 7.25]))
    categories = [{"id": 9, "name": "bar"}, {"id": 4, "name": "square"}]
    write(root, {"images": entries, "annotations": annotations, "categories": categories})
    for entry, square, bar in zip(entries, annotations[::2], annotations[1::2], strict=True):
        pixels = np.full((size[1], size[0], 3), background, np.uint8)
        for (x, y, w, h), color in ((bar["bbox"], (30, 40, 220)), (square["bbox"], (230, 30, 20))):
            pixels[int(y) : int(y + h + 0.99), int(x) : int(x + w + 0.99)] = color
        Image.fromarray(pixels).save(root / "val2017" / entry["file_name"])
    return root


def recipe(**changes):
    return dataclasses.replace(TOY, **{"min_area_px": 16.0, "crop_px": 16, "pairs": 100} | changes)


def counted_iou(box, other):
    """Pixel by pixel; whole numbers only."""

    def pixels(b):
        return {(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))}

    a, b = pixels(box), pixels(other)
    return len(a & b) / len(a | b)


def test_overlap_is_what_counting_pixels_gives():
    rng = np.random.RandomState(0)
    low = rng.randint(0, 12, (40, 2))
    boxes = np.concatenate([low, low + rng.randint(1, 9, (40, 2))], axis=1)
    found = overlap(boxes[:25], boxes[25:].astype(float))
    assert found.shape == (25, 15)
    for i, box in enumerate(boxes[:25]):
        for j, other in enumerate(boxes[25:]):
            assert found[i, j] == pytest.approx(counted_iou(box, other), abs=1e-12)
    assert found.min() == 0
    assert overlap(np.array([[1, 1, 4, 5]]), np.array([[1.0, 1.0, 4.0, 5.0]])).item() == 1
    assert overlap(np.array([[0, 0, 2, 2]]), np.array([[0.5, 0.0, 2.5, 2.0]])).item() == pytest.approx(3 / 5)


def test_the_gallery_has_places_of_every_scale_within_the_image_in_random_order():
    boxes = draw_gallery(np.random.default_rng(0), 50, 40, scales=(0.2, 0.5, 1.0), places=400)
    sides = boxes[:, 2] - boxes[:, 0]
    assert (sides == boxes[:, 3] - boxes[:, 1]).all()
    assert {side: int((sides == side).sum()) for side in (8, 20, 40)} == {8: 400, 20: 400, 40: 400}
    assert boxes.min() == 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (50, 40)
    small = boxes[sides == 8]
    assert set(small[:, 0].tolist()) == set(range(43))  # every place that fits
    assert set(small[:, 1].tolist()) == set(range(33))
    assert len(set(sides[:10].tolist())) > 1
    tiny = draw_gallery(np.random.default_rng(0), 3, 2, scales=(0.2,), places=5)
    assert ((tiny[:, 2] - tiny[:, 0]) == 1).all()


def by_hand(subject, recipe):
    """Every target's similarities and IoUs by plain loops; checks on the way that it is a target."""
    annotations, split = subject.dataset.annotations["val"], subject.split("val")
    targets, possible, _ = choose_targets(subject, recipe)
    assert len(targets) == min(possible, recipe.pairs)
    for target in targets:
        whole = {}
        for row in range(len(annotations)):
            x, y, w, h = annotations.box[row].tolist()
            usable = not annotations.crowd[row] and w * h >= recipe.min_area_px
            if usable and annotations.category[row] == target.category:
                whole.setdefault(int(annotations.image[row]), []).append((x, y, x + w, y + h))
        assert target.query_image != target.image
        queries = [
            [math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)]
            for x0, y0, x1, y1 in whole[target.query_image]
        ]
        assert target.query.tolist() in queries
        crops = [split.image(target.query_image).crop(target.query.tolist())]
        crops += [split.image(target.image).crop(box) for box in target.gallery.tolist()]
        colors = []
        for crop in crops:
            pixels = np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC)) / 255
            colors.append((pixels.reshape(-1, 3).mean(axis=0) - 0.5) / 0.5)
        similarity, iou = [], []
        for color, box in zip(colors[1:], target.gallery.tolist(), strict=True):
            lengths = math.sqrt(sum(colors[0] ** 2)) * math.sqrt(sum(color**2))
            similarity.append(float(sum(colors[0] * color)) / lengths)
            overlaps = []
            for x0, y0, x1, y1 in whole[target.image]:
                wide = max(0, min(x1, box[2]) - max(x0, box[0]))
                high = max(0, min(y1, box[3]) - max(y0, box[1]))
                union = (x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - wide * high
                overlaps.append(wide * high / union)
            iou.append(max(overlaps))
        yield similarity, iou


def test_similarities_overlaps_and_scores_are_those_by_hand(tmp_path):
    one = subject(scenes(tmp_path))
    settings = recipe(interpolation="bicubic")
    expected = list(by_hand(one, settings))
    found = list(retrieve(one, settings, choose_targets(one, settings)[0]))
    assert len(found) == len(expected) == 16
    for each, (similarity, iou) in zip(found, expected, strict=True):
        assert each.similarity == pytest.approx(similarity, abs=1e-5)
        assert each.iou == pytest.approx(iou, abs=1e-12)
        assert each.similarity[each.retrieved] == each.similarity.max()
    got, chance, best, hits, lucky = [], [], [], [], []
    for similarity, iou in expected:
        chosen = iou[similarity.index(max(similarity))]
        got.append(chosen)
        chance.append(sum(iou) / 25)
        best.append(max(iou))
        hits.append(chosen == max(iou) > 0)
        lucky.append(sum(value == max(iou) > 0 for value in iou) / 25)
    scores = run(one, settings)
    n = len(got)
    assert scores.main == "iou"
    for name, values in (("iou", got), ("iou_random", chance), ("iou_oracle", best), ("top1", hits)):
        assert scores.metrics[name].value == pytest.approx(100 * sum(values) / n)
        error = 100 * np.std(np.array(values, float), ddof=1) / math.sqrt(n)
        assert (scores.metrics[name].stderr, scores.metrics[name].n) == (pytest.approx(error), n)
    assert scores.metrics["top1_random"].value == pytest.approx(100 * sum(lucky) / n)
    share = (sum(got) - sum(chance)) / (sum(best) - sum(chance))
    assert scores.metrics["normalized"].value == pytest.approx(100 * share)
    assert scores.details["iou_of_targets"] == pytest.approx(got, abs=1e-6)
    sides = [t.target.gallery[t.retrieved][2] - t.target.gallery[t.retrieved][0] for t in found]
    shares = [round(0.2 * 48), round(0.35 * 48), round(0.5 * 48), round(0.65 * 48), round(0.8 * 48)]
    assert scores.details["boxes_retrieved_by_scale"] == [sum(side == share for side in sides) for share in shares]
    assert scores.details["possible_targets"] == 16


def test_a_network_that_sees_the_object_finds_the_best_box(tmp_path):
    """Boxes as large as the only object: the redder, the better placed. Chance and the opposite are far from it."""
    one = subject(scenes(tmp_path, images=20))
    categories = one.dataset.categories
    targets, _, _ = choose_targets(one, settings := recipe(scales=(0.5,), places=25))
    squares = [target for target in targets if categories[target.category] == "square"]
    assert len(squares) == 20
    found = list(retrieve(one, settings, squares))
    assert [each.iou[each.retrieved] for each in found] == [each.iou.max() for each in found]


def test_pixels_are_compared_at_the_recipes_size(tmp_path):
    one = subject(scenes(tmp_path, images=3), Pixels())
    locality.check(one, recipe())
    settings = recipe(pairs=1)
    (each,) = retrieve(one, settings, choose_targets(one, settings)[0])
    crops = [one.split("val").image(each.target.query_image).crop(each.target.query.tolist())]
    crops += [one.split("val").image(each.target.image).crop(box) for box in each.target.gallery.tolist()]
    flat = np.stack([np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC), float).ravel() for crop in crops])
    flat = flat / 127.5 - 1
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    assert each.similarity == pytest.approx(unit[1:] @ unit[0], abs=1e-5)


def odd_ones(root):
    """Six images: crowds, small objects, several objects, a category that one image shows."""
    entries = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(6)]
    crowd = {"iscrowd": 1, "segmentation": {"counts": [2400], "size": [40, 60]}}
    boxes = [
        annotation(1, 0, 1, [0, 0, 20, 20]),
        annotation(2, 0, 1, [30, 10, 20, 20]),  # two in one image
        annotation(3, 1, 1, [5, 5, 20, 20]),
        annotation(4, 1, 1, [30, 5, 25, 20], **crowd),  # of the same category: no target, but a query
        annotation(5, 2, 1, [5, 5, 3, 3]),  # small alone: neither
        annotation(6, 3, 1, [5, 5, 20, 20]),
        annotation(7, 3, 2, [30, 5, 20, 20]),  # the only image of its category
        annotation(8, 3, 1, [40, 30, 2, 2]),  # small beside a large one
        annotation(9, 4, 1, [10, 10, 30, 25], **crowd),  # a crowd alone
        annotation(10, 4, 2, [0, 0, 20, 20], **crowd),  # and of the category that one image shows
        annotation(11, 5, 3, [1, 1, 20, 20]),
        annotation(12, 4, 3, [1, 1, 20, 10]),
        annotation(13, 4, 3, [70, 1, 20, 10]),  # outside: dropped by the reader
        annotation(14, 5, 4, [30, 1, 20, 20]),  # alone, and beside a crowd: counted once
        annotation(15, 5, 4, [1, 25, 50, 14], **crowd),
    ]
    categories = [{"id": number, "name": f"c{number}"} for number in (1, 2, 3, 4)]
    return write(root, {"images": entries, "annotations": boxes, "categories": categories})


def test_what_is_no_target_is_left_out_and_counted(tmp_path):
    one = subject(odd_ones(tmp_path))
    targets, possible, skipped = choose_targets(one, recipe())
    assert possible == 4
    assert {(target.image, target.category) for target in targets} == {(0, 0), (3, 0), (4, 2), (5, 2)}
    assert dataclasses.asdict(skipped) == {
        "crowds": 4,
        "small": 2,
        "targets_with_a_crowd": 2,  # in images 1 and 5; where there is a crowd alone, there is no usable object either
        "targets_of_one_image": 1,
    }
    assert "1 boxes" in one.dataset.notes[0]
    objects = {target.image: target.objects.tolist() for target in targets}
    assert objects[0] == [[0, 0, 20, 20], [30, 10, 50, 30]]
    assert objects[3] == [[5, 5, 25, 25]]
    queries = set()
    for seed in range(30):
        for target in choose_targets(subject(one.dataset, seed=seed), recipe())[0]:
            if target.image == 0:
                queries.add((target.query_image, *target.query.tolist()))
    assert queries == {(1, 5, 5, 25, 25), (3, 5, 5, 25, 25)}
    scores = run(one, recipe())
    assert scores.details["skipped"] == dataclasses.asdict(skipped)
    assert scores.metrics["iou"].n == 4


def test_the_best_of_several_objects_counts(tmp_path):
    one = subject(odd_ones(tmp_path))
    (each,) = [each for each in retrieve(one, recipe(), choose_targets(one, recipe())[0]) if each.target.image == 0]
    first, second = ([counted_iou(box, thing) for box in each.target.gallery] for thing in each.target.objects)
    assert each.iou == pytest.approx(np.maximum(first, second))
    assert each.iou != pytest.approx(first)
    assert each.iou != pytest.approx(second)


def same(a, b):
    return (
        (a.image, a.category, a.query_image) == (b.image, b.category, b.query_image)
        and np.array_equal(a.gallery, b.gallery)
        and np.array_equal(a.query, b.query)
    )


def test_targets_depend_on_the_seed_alone_and_more_pairs_only_add(tmp_path):
    root = scenes(tmp_path)
    few, again, many, other = (
        choose_targets(subject(root, seed=seed), recipe(pairs=pairs))[0]
        for seed, pairs in ((0, 5), (0, 5), (0, 9), (1, 5))
    )
    assert (len(few), len(many)) == (5, 9)
    assert all(map(same, few, again))
    assert all(map(same, few, many))
    assert not any(map(same, few, other))
    named = [(target.image, target.category) for target in many]
    assert len(set(named)) == 9
    assert named[:5] != [(target.image, target.category) for target in other]
    every = choose_targets(subject(root), recipe())[0]
    for image in range(8):
        first, second = [target for target in every if target.image == image]
        assert not np.array_equal(np.sort(first.gallery, axis=0), np.sort(second.gallery, axis=0))


def test_crops_have_the_recipes_size_and_on_built_in_data_the_networks_own(tmp_path):
    own, toy = open_coco(str(scenes(tmp_path))), open_coco("toy-coco")
    views = [locality._reading(subject(data), TOY).view for data in (own, toy)]
    assert [(view.resize_px, view.crop_px) for view in views] == [(48, 48), (16, 16)]
    assert locality._reading(subject(toy, Pixels()), TOY).view.crop_px == 48


@pytest.mark.parametrize("effort", [{"batch_size": 4}, {"batch_size": 1000}, {"workers": 1}])
def test_neither_batch_size_nor_workers_change_the_scores(effort, tmp_path):
    root = scenes(tmp_path)
    plain, other = (run(subject(root, tiny_backbone(), **each), recipe()) for each in ({}, effort))
    assert {name: score.value for name, score in plain.metrics.items()} == pytest.approx(
        {name: score.value for name, score in other.metrics.items()}
    )


def test_the_ratio_of_means_and_its_error():
    rng = np.random.RandomState(0)
    below = rng.rand(400) + 0.2
    above = below * 0.4 + 0.1 * rng.randn(400)
    found = ratio(above, below)
    assert found.value == pytest.approx(100 * above.sum() / below.sum())
    left_out = [100 * (above.sum() - a) / (below.sum() - b) for a, b in zip(above, below, strict=True)]  # jackknife
    assert found.stderr == pytest.approx(math.sqrt(399 * np.var(left_out)), rel=0.02)


def test_where_all_boxes_are_alike_there_is_no_normalized_score(tmp_path):
    scores = run(subject(scenes(tmp_path)), recipe(scales=(0.5,), places=1, pairs=1))
    assert "normalized" not in scores.metrics
    assert scores.metrics["iou"].value == scores.metrics["iou_oracle"].value == scores.metrics["iou_random"].value
    assert scores.metrics["iou"].stderr is None


def test_a_box_that_misses_is_no_hit(tmp_path):
    """Where no box meets the object, all have the best IoU, which is 0."""
    one = subject(odd_ones(tmp_path))
    target = choose_targets(one, recipe())[0][0]
    far = dataclasses.replace(target, objects=np.array([[1000.0, 0, 1020, 20]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality, "choose_targets", lambda *_: ([far], 1, locality.Skipped(0, 0, 0, 0)))
        scores = run(one, recipe())
    assert scores.metrics["top1"].value == scores.metrics["top1_random"].value == 0


# What the paper says, typed again: 25 boxes of 5 scales at 5 places, crops of 224 px, the instance representation
# (for other methods the class token). The rest is ours and must not change without a new VERSION.
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_their_sources_say(name):
    row = RECIPES[name]
    assert (len(row.scales), row.places) == (5, 5)
    assert row.scales == (0.2, 0.35, 0.5, 0.65, 0.8)
    assert row.vector == {"extrema": "cls", "patch_mean": "patch_mean", "toy": "cls"}[name]
    assert row.crop_px == (48 if name == "toy" else 224)
    assert (row.pairs, row.min_area_px) == ((300, 64) if name == "toy" else (1000, 32**2))
    assert (row.norm, row.interpolation, row.selected_on) == (True, "bicubic", "none")
    assert next(iter(RECIPES)) == "extrema"


@pytest.mark.parametrize(
    "change",
    [
        {"scales": ()},
        {"scales": (0.5, 0.0)},
        {"scales": (0.5, 1.1)},
        {"places": 0},
        {"pairs": 0},
        {"crop_px": 0},
        {"min_area_px": -1.0},
    ],
)
def test_impossible_recipes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        recipe(**change)


def without(**changes):
    network = MeanColor()
    network.architecture = dataclasses.replace(network.architecture, **changes)
    return network


def test_what_cannot_be_run_is_refused_before_an_image_is_read(tmp_path):
    root = scenes(tmp_path / "a", images=2)
    for path in (root / "val2017").iterdir():
        path.write_bytes(b"no image")
    locality.check(subject(root), recipe())
    assert locality.readings(subject(root), recipe()) == {}
    with pytest.raises(UserError, match=r"fake.pt: .*no class token.*locality/patch_mean"):
        locality.check(subject(root, without(cls=False)), recipe())
    locality.check(subject(root, without(cls=False)), recipe(vector="patch_mean"))
    with pytest.raises(UserError, match=r"final norm.*norm=false"):
        locality.check(subject(root, without(final_norm=False)), recipe())
    with pytest.raises(UserError, match="crop_px=18 does not divide into patches of 4 px"):
        locality.check(subject(root), recipe(crop_px=18))
    with pytest.raises(UserError, match=r"no object to be found.*of 4 objects in 2 val images.*4 smaller than 1000 px"):
        locality.check(subject(root), recipe(min_area_px=1000.0))
    image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}
    only_train = write(tmp_path / "b", {"images": [image], "annotations": [], "categories": []}, "train2017")
    with pytest.raises(UserError, match="no val split"):
        locality.check(subject(only_train), recipe())


def test_broken_images_are_refused_or_left_out(tmp_path):
    root = scenes(tmp_path, images=6)
    whole = run(subject(root), recipe())
    (root / "val2017" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3.png.*--skip-broken"):
        run(subject(root), recipe())
    scores = run(subject(root, skip_broken=True), recipe())
    targets, _, _ = choose_targets(subject(root), recipe())
    gone = [3 in (target.image, target.query_image) for target in targets]
    assert scores.details["broken_targets"] == sum(gone) >= 2
    assert scores.metrics["iou"].n == len(targets) - sum(gone)
    kept = [iou for iou, lost in zip(whole.details["iou_of_targets"], gone, strict=True) if not lost]
    assert scores.details["iou_of_targets"] == kept
    for path in (root / "val2017").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not one of 12 targets"):
        run(subject(root, skip_broken=True), recipe())


def test_features_that_are_not_finite_are_refused(tmp_path):
    class Broken(MeanColor):
        def forward(self, images, *, layers, norm):
            return Output(tuple(Tokens(images.mean(dim=(2, 3)) * math.nan, images) for _ in layers))

    with pytest.raises(UserError, match="not finite"):
        run(subject(scenes(tmp_path), Broken()), recipe())


def test_a_run_from_checkpoint_to_record(tmp_path):
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", "locality", dataset="toy-coco", settings={"pairs": "12"})
    assert (record.recipe, record.dataset, record.main_metric, record.selected_on) == ("toy", "toy-coco", "iou", "none")
    assert record.n_samples.evaluated["train"] == 0
    assert 12 <= record.n_samples.evaluated["val"] <= 24
    assert record.scores["iou"].n == 12
    assert record.scores["iou_random"].value < record.scores["iou_oracle"].value
    root = scenes(tmp_path / "mine", images=4)
    options = {"dataset": str(root), "settings": {"crop_px": "16", "min_area_px": "16"}}
    (record,) = ssl_bench.run(tmp_path / "tiny.pt", "locality/patch_mean", **options)
    assert record.overrides == {"crop_px": 16, "min_area_px": 16.0}
    assert record.scores["iou"].n == 8
    with pytest.raises(UserError, match=r"toy is no dataset of images with boxes.*toy-coco"):
        ssl_bench.run(tmp_path / "tiny.pt", "locality", dataset="toy")
