"""`ssl-bench show`: which pictures of which images, where they go, what is refused, and what methods show students."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_architecture, tiny_backbone
from PIL import Image
from test_pictures import trained
from test_run import in_process
from tiny_training import ARCHITECTURE, write_base

from ssl_bench import masked_views
from ssl_bench.errors import UserError
from ssl_bench.evaluate import decoding
from ssl_bench.evaluate.adapters import EncoderAdapter
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import Backbone, build
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.pictures import reconstruction, similarity
from ssl_bench.evaluate.pictures import sheet as sheets
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.evaluate.training.augment import augmentation_named
from ssl_bench.evaluate.training.blockwise import ALIEN
from ssl_bench.evaluate.training.loader import Views, sample_generator
from ssl_bench.picture_kinds import DEFAULT, KINDS, READ_BY_SOME, Options, query_box
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.method import Sampling
from ssl_bench.show import show


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    save_checkpoint(tmp_path / "tiny.pt", tiny_backbone())
    return str(tmp_path / "tiny.pt")


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    return write(tmp_path / "cat.png")


def write(path: Path, width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Path:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def options(tmp_path: Path, **changes) -> Options:
    return Options(out=tmp_path / "out", **changes)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        opened.load()
        assert opened.format == "PNG"
        return opened.size


def test_the_default_set_is_drawn_and_named_after_image_and_kind(tmp_path, tiny, cat, call):
    code, out, _ = call("show", tiny, cat, "--out", tmp_path / "out")
    assert code == 0
    names = [f"cat-{kind}.png" for kind in ("similarity", "attention", "clusters")]
    assert out.splitlines() == [str(tmp_path / "out" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)  # and nothing half-written
    # Six cells of 240 px, 14 px apart, within margins of 20 px; three; two, which are as wide as three.
    widths = [size_of(tmp_path / "out" / name)[0] for name in names]
    assert widths == [2 * 20 + 6 * 240 + 5 * 14, 2 * 20 + 3 * 240 + 2 * 14, 2 * 20 + 3 * 240]


def test_options_reach_the_pictures(tmp_path, tiny, cat, call):
    arguments = ("show", tiny, cat, "--out", tmp_path, "-k", "similarity,queries", "--threshold", "0.3", "--size", "24")
    code, _, _ = call(*arguments, "--point", "3,4", "--point", "30,20", "--layer", "0")
    assert code == 0
    assert size_of(tmp_path / "cat-queries.png")[0] == 2 * 20 + 4 * 240 + 3 * 14
    two = size_of(tmp_path / "cat-similarity.png")
    assert two[0] == 2 * 20 + 3 * 240 + 2 * 14
    assert call(*arguments, "--point", "3,4")[0] == 0
    one = size_of(tmp_path / "cat-similarity.png")  # replaced
    assert two[1] - one[1] > 180  # a row of cells less


def test_all_kinds_that_can_share_a_forward_pass_do(tmp_path, tiny, cat, monkeypatch):
    forwards = []
    original = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, *a, **k: forwards.append(1) or original(self, *a, **k))
    kinds = ("similarity", "attention", "queries", "clusters", "layers")
    found = show(tiny, [cat, write(tmp_path / "dog.png", seed=1)], options(tmp_path, kinds=kinds))
    assert len(found) == 10
    assert len(forwards) == 2


def test_checkpoints_beside_each_other_keep_their_names_apart(tmp_path, tiny, cat, monkeypatch):
    seen = []
    monkeypatch.setattr(similarity, "draw", lambda each, _: seen.extend(each) or Image.new("RGB", (1, 1)))
    show(tiny, [cat], options(tmp_path, kinds=["similarity"], beside=[tiny, "random:vit_32x2x2_patch8_16"]))
    assert [each.name for each in seen] == ["tiny", f"tiny (2: {tiny})", "random-vit_32x2x2_patch8_16"]
    assert not torch.equal(seen[0].patches, seen[2].patches)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16", "1"])
def test_images_of_every_mode(tmp_path, tiny, mode):
    if mode == "I;16":
        path = tmp_path / "a.png"
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path)
    else:
        path = write(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode=mode)
    (found,) = show(tiny, [path], options(tmp_path, kinds=["similarity"]))
    assert size_of(found)[0] == 1550


@pytest.mark.parametrize("size", [(1, 1), (900, 2), (3, 400)])
def test_images_of_every_size(tmp_path, tiny, size):
    path = write(tmp_path / "odd.png", *size)
    kinds = ("similarity", "attention", "queries", "clusters", "layers", "locality", "inversion", "masked-views")
    found = show(tiny, [path], options(tmp_path, kinds=kinds, steps=1, mask_ratios=[0.5], masked_views="mae/toy"))
    assert len(found) == len(kinds)


def test_every_other_kind_by_its_option(tmp_path, cat):
    head = {f"{layer}.weight": torch.randn(n, m) for layer, n, m in ((0, 8, 32), (2, 8, 8), (4, 192, 8))}
    head |= {key.replace("weight", "bias"): torch.zeros(len(value)) for key, value in head.items()}
    torch.manual_seed(0)
    adapter = EncoderAdapter(32, 2, blocks_per_group=1, hidden=8).state_dict()
    extras = {"reconstruction": head, "encoder_adapter": adapter}
    save_checkpoint(tmp_path / "rich.pt", tiny_backbone(), extras=extras)
    mask = np.zeros((30, 40), np.uint8)
    mask[:20, :20] = 1
    Image.fromarray(mask).save(tmp_path / "objects.png")
    found = show(
        str(tmp_path / "rich.pt"),
        [cat],
        options(
            tmp_path,
            kinds=["layers", "reconstruction", "locality"],
            invert=True,
            steps=2,
            mask_ratios=[0.25, 0.5],
            masks=[tmp_path / "objects.png"],
            masked_views="mae/toy",
            query=write(tmp_path / "dog.png", seed=1),
            box="0,0,20,20",
        ),
    )
    kinds = ("layers", "reconstruction", "locality", "inversion", "masked-views", "histogram")
    assert [path.name for path in found] == [f"cat-{kind}.png" for kind in kinds]
    widths = [size_of(path)[0] for path in found]
    assert widths[0] == 2 * 20 + 240 + 2 * 460 + 2 * 14  # two plots
    assert widths[1:4] == [40 + 3 * 240 + 2 * 14, 40 + 6 * 240 + 5 * 14, 40 + 3 * 240 + 2 * 14]


def test_pixels_are_rebuilt_by_the_network_whose_head_can(tmp_path, cat, monkeypatch):
    """MMC evaluates its teacher, and its student has learned to rebuild."""
    _, path = trained("mmc", tmp_path)
    used = []
    original = reconstruction.reconstruct
    monkeypatch.setattr(
        reconstruction,
        "reconstruct",
        lambda checkpoint, *a, **k: used.append(checkpoint) or original(checkpoint, *a, **k),
    )
    seen = []
    monkeypatch.setattr(similarity, "draw", lambda each, _: seen.extend(each) or Image.new("RGB", (1, 1)))
    show(str(path), [cat], options(tmp_path, kinds=["similarity", "reconstruction"]))
    assert [each.key for each in used] == ["student"]
    assert [each.name for each in seen] == ["mmc, teacher"]


def test_every_file_is_decoded_once(tmp_path, tiny, cat, monkeypatch):
    found = []
    original = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda path, **more: found.append(path) or original(path, **more))
    dog, query = write(tmp_path / "dog.png", seed=1), write(tmp_path / "query.png", seed=2)
    kinds = ["similarity", "locality"]
    show(tiny, [cat, dog], options(tmp_path, kinds=kinds, query=query, masked_views="mae/toy"))
    assert sorted(found) == sorted([cat, dog, query])


def test_every_option_is_read_by_somebody_and_has_its_flag(call):
    read = {name for kind in KINDS.values() for name in kind.reads.split()}
    assert read == set(READ_BY_SOME)
    assert read < {field.name for field in fields(Options)}
    help_ = call("show", "--help")[1]
    assert all(flag in help_ for flag in READ_BY_SOME.values())


# Refusals


def kinds_of(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point", "40,0"], "--point 40,0 lies outside of .*cat.png, which has 40 x 30 px: expected x in 0 to 39"),
        (["--point", "0,-1"], "lies outside"),
        (["--point", "here"], "--point here: expected x,y"),
        (["--point", "1,2,3"], "expected x,y"),
        (["-k", "similarty"], "did you mean 'similarity'"),
        (["--size", "5"], "--size 5: expected at least one patch of 8 px"),
        (["--size", "0"], "--size 0: expected at least 1"),
        (["--size", "1000000"], "--size 1000000: .* 4,096 at most can be drawn with attention. Try --size"),
        (["--size", "1000000", "-k", "clusters"], "16,384 at most can be drawn. Try --size"),
        (["--beside", "~no such user/x.pt"], "~no such user/x.pt: there is no user of that name"),
        (["--out", "~no such user/x"], "~no such user/x: there is no user of that name"),
        (["--layer", "2"], "--layer 2: tiny has 2 blocks, 0 to 1"),
        (["--threshold", "1"], "--threshold 1: expected a cosine"),
        (["--invert", "--mask-ratio", "1"], "--mask-ratio 1: expected a share"),
        (["--invert", "--steps", "0"], "--steps 0: expected at least 1"),
        (["-k", "histogram"], "--mask FILE"),
        (["--mask", "no.png", "--mask", "no.png"], "2 --mask for 1 images"),
        (["--mask", "no.png"], "cannot decode no.png"),
        (["-k", "masked-views"], "needs a method"),
        (["--masked-views", "mea"], "did you mean 'mae'"),
        (["--masked-views", "mae/papers"], "did you mean 'paper'"),
        (["-k", "reconstruction"], "has no head that gives pixels. Beyond the backbone it holds: nothing"),
        (["-k", "locality", "--box", "0,0,50,9"], "--box 0,0,50,9: expected 0 <= left < right <= 40"),
        (["-k", "locality", "--box", "5"], "expected left,top,right,bottom"),
        (["-k", "locality", "--query", "no.png"], "cannot decode no.png"),
        (["--device", "tpu"], "--device tpu"),
        (
            ["--box", "0,0,9,9"],
            "--box is read by locality, and .* is similarity, attention, clusters: leave it out, or",
        ),
        (["-k", "clusters", "--point", "1,1"], "--point is read by similarity, queries, locality, and"),
        (["-k", "clusters", "--threshold", "0.5"], "--threshold is read by similarity"),
        (["-k", "clusters", "--steps", "5"], "--steps is read by inversion"),
        (["-k", "similarity", "--mask-ratio", "0.5"], "--mask-ratio is read by inversion"),
        (["--query", "no.png"], "--query is read by locality"),
        (["-k", "locality", "--query", "no.png", "--point", "1,1"], "with --query FILE use --box"),
        (["-k", "layers", "--layer", "0"], "--layer is read by similarity, attention, queries, clusters, histogram,"),
        (["-k", "locality", "--size", "64"], "--size is read by"),
        (["--masked-views", "mae/toy", "--beside", "random:vit_32x2x2_patch8_16"], "--beside is read by"),
        (["--beside", "no.pt"], "'no.pt' does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, tiny, cat, call, arguments, message):
    import re

    code, out, error = call("show", tiny, cat, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert re.search(message, error)
    assert out == ""
    assert kinds_of(tmp_path) == set()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("attention", "the image itself has no attention"),
        ("queries", "the image itself has no attention"),
        ("layers", "has no blocks"),
        ("inversion", "nothing to invert"),
        ("reconstruction", "no head"),
    ],
)
def test_pixels_have_no_inner_life(tmp_path, cat, kind, reason):
    with pytest.raises(UserError, match=f"pixels:: {kind} cannot be drawn: .*{reason}"):
        show("pixels:", [cat], options(tmp_path, kinds=[kind]))


def test_by_default_what_a_network_lacks_is_left_out_and_said(tmp_path, cat, capsys):
    found = show("pixels:", [cat], options(tmp_path, size_px=40))
    assert [path.name for path in found] == ["cat-similarity.png", "cat-clusters.png"]
    assert "attention is left out: the image itself has no attention" in capsys.readouterr().err


def test_class_attention_needs_a_class_token_and_queries_do_not(tmp_path, cat):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "flat.pt", build(replace(tiny_architecture(), cls=False, position_of_prefix=False)))
    with pytest.raises(UserError, match=r"flat\.pt: attention cannot be drawn: it has no class token"):
        show(str(tmp_path / "flat.pt"), [cat], options(tmp_path, kinds=["attention"]))
    (found,) = show(str(tmp_path / "flat.pt"), [cat], options(tmp_path, kinds=["queries"]))
    assert size_of(found)[0] == 2 * 20 + 3 * 240  # the image and one map


def test_a_broken_image_among_good_ones_stops_before_the_first(tmp_path, tiny, cat):
    (tmp_path / "broken.png").write_bytes(cat.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot decode .*broken\.png"):
        show(tiny, [cat, tmp_path / "broken.png"], options(tmp_path))
    assert kinds_of(tmp_path) == set()


def test_two_images_of_one_name_are_refused(tmp_path, tiny, cat):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="have the same name"):
        show(tiny, [cat, write(tmp_path / "other" / "cat.png")], options(tmp_path))


def test_only_files_of_our_own_are_replaced(tmp_path, tiny, cat):
    for _ in range(2):
        show(tiny, [cat], options(tmp_path))
    theirs = tmp_path / "out" / "cat-clusters.png"
    theirs.write_bytes(cat.read_bytes())
    for path in (tmp_path / "out").glob("cat-[!c]*"):
        path.unlink()
    with pytest.raises(UserError, match=r"cat-clusters\.png exists, and it was not written by `ssl-bench show`"):
        show(tiny, [cat], options(tmp_path))
    assert theirs.read_bytes() == cat.read_bytes()
    assert kinds_of(tmp_path) == {"cat-clusters.png"}


def test_the_query_is_cut_around_the_point_and_within_the_image():
    image = Image.new("RGB", (100, 40))
    assert query_box(None, image, None) == (40, 10, 60, 30)
    assert query_box(None, image, (99, 0)) == (80, 0, 100, 20)
    assert query_box("1,2,3,4", image, (99, 0)) == (1, 2, 3, 4)


def test_help_names_every_kind(call):
    code, out, _ = call("show", "--help")
    assert code == 0
    assert set(DEFAULT) <= set(KINDS)
    for kind in KINDS:
        assert kind in " ".join(out.replace("│", " ").split())


# Masked views


def images() -> list[Image.Image]:
    return [Image.fromarray(np.random.RandomState(n).randint(0, 256, (60, 48, 3)).astype(np.uint8)) for n in (0, 1)]


def drawn(method: str, recipe, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A batch of two as the loop would draw it."""
    architecture = named(ARCHITECTURE)
    sampling = Sampling(
        augmentation_named(recipe.augmentation), 48, 8, functools.partial(METHODS[method].draw, recipe, architecture)
    )
    samples = [sampling(image, n, sample_generator(seed, 0, n)) for n, image in enumerate(images())]
    return tuple(
        [torch.from_numpy(np.stack(part)) for part in zip(*side, strict=True)] for side in zip(*samples, strict=True)
    )


def seen_by_the_student(method: str, recipe, views, draws) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """What a step of the method gives to its student: images in [0, 1] and the patches that stay."""
    torch.manual_seed(0)
    architecture = named(ARCHITECTURE)
    network = METHODS[method].make(recipe, architecture, None)
    student = network.encoder if method == "mae" else network.student
    student = student if isinstance(student, Backbone) else student.backbone
    found = []
    student.register_forward_pre_hook(
        lambda module, given, options: found.append((given[0].detach(), options.get("keep"))), with_kwargs=True
    )
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (architecture.mean, architecture.std))
    network(Views(tuple((view.float() / 255 - mean) / std for view in views), tuple(draws)))
    return [(given * std + mean, keep) for given, keep in found]


@pytest.mark.parametrize(
    ("method", "row"), [("mae", "toy"), ("sdae", "toy"), ("moca", "toy"), ("mmc", "toy-multicrop")]
)
def test_masked_views_are_what_the_student_is_given(method, row):
    fewer = {"new_words": 2} if method == "moca" else {}
    recipe = replace(METHODS[method].RECIPES[row], arch=ARCHITECTURE, **fewer)
    for seed in range(4 if method == "mmc" else 1):  # of MMC's views some are covered by another image
        views, draws = drawn(method, recipe, seed)
        shown = masked_views._INPUTS[method](recipe, named(ARCHITECTURE), [v.float() / 255 for v in views], draws)
        given, keep = seen_by_the_student(method, recipe, views, draws)[0]
        if method == "mmc":
            for number in range(2):  # 2 views of 2 images, view by view
                torch.testing.assert_close(shown[number][1][0], given[2 * number], atol=1e-5, rtol=1e-5)
            assert len(shown) == 2  # local views are drawn as views alone
            continue
        for number in range(2 if method == "moca" else 1):
            place = 2 * number
            picture = shown[number][1][0].reshape(3, 6, 8, 6, 8).permute(1, 3, 0, 2, 4).flatten(0, 1)
            whole = given[place].reshape(3, 6, 8, 6, 8).permute(1, 3, 0, 2, 4).flatten(0, 1)
            kept = keep[place].tolist()
            for patch in range(36):
                expected = whole[patch] if patch in kept else torch.full((3, 8, 8), 0.5)
                torch.testing.assert_close(picture[patch], expected, atol=1e-5, rtol=1e-5)


def visible(picture: torch.Tensor) -> set[int]:
    patches = picture[0].reshape(3, 6, 8, 6, 8).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
    return {number for number, patch in enumerate(patches) if not (patch == 0.5).all()}


@torch.no_grad()
def tokens_in_extremas_first_block(recipe, views, draws) -> tuple[torch.Tensor, torch.Tensor]:
    """All patch tokens of the first image, (N, D), and those that the student's first block reads in a step."""
    torch.manual_seed(0)
    architecture = named(ARCHITECTURE)
    network = METHODS["extrema"].make(recipe, architecture, None).eval()
    given = []
    network.student.vit.blocks[0].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (architecture.mean, architecture.std))
    images_ = [(view.float() / 255 - mean) / std for view in views]
    network(Views(tuple(images_), tuple(draws)))
    whole, _ = network.student.embed(images_[0])
    return whole[0], given[0]


def test_masks_of_extrema_and_folds_of_sdae_share_no_patch():
    recipe = replace(METHODS["extrema"].RECIPES["80x5"], arch=ARCHITECTURE)
    views, draws = drawn("extrema", recipe, 0)
    shown = masked_views._INPUTS["extrema"](recipe, named(ARCHITECTURE), [v.float() / 255 for v in views], draws)
    masks = [visible(picture) for _, picture in shown]
    whole, given = tokens_in_extremas_first_block(recipe, views, draws)
    for mask, tokens in zip(masks[:-1], given[: len(masks) - 1], strict=True):  # of the first image
        known = {row: int((whole - each).abs().amax(dim=1).argmin()) for row, each in enumerate(tokens)}
        torch.testing.assert_close(tokens, whole[list(known.values())])
        assert set(known.values()) == mask
    assert len(set.union(*masks[:-1])) == 5 * 7
    assert len(masks[-1]) == 36  # the teacher sees all
    recipe = replace(METHODS["sdae"].RECIPES["toy"], arch=ARCHITECTURE)
    views, draws = drawn("sdae", recipe, 0)
    shown = masked_views._INPUTS["sdae"](recipe, named(ARCHITECTURE), [v.float() / 255 for v in views], draws)
    folds = [visible(picture) for _, picture in shown]
    assert [len(fold) for fold in folds] == [9, 9, 9, 9]
    assert len(set.union(*folds)) == 36


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shows_its_views(method, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_base(tmp_path / "base.pt"))
    notes = []
    original = masked_views.sheet
    monkeypatch.setattr(
        masked_views, "sheet", lambda *given, **more: notes.append(more["note"]) or original(*given, **more)
    )
    picture = masked_views.draw(f"{method}/toy", checkpoint, images(), seed=0)
    assert picture.height > 2 * 240
    assert ("Gray patches are hidden" in notes[0]) == (method != "mmc")
    assert ("Noise or another image covers" in notes[0]) == (method == "mmc")


def test_another_image_is_needed_where_its_pixels_cover(tmp_path):
    checkpoint = open_checkpoint(write_base(tmp_path / "base.pt"))
    recipe = METHODS["mmc"].RECIPES["toy"]

    def covers(seed: int) -> bool:
        rng = sample_generator(seed, 0, 0)
        Sampling(augmentation_named(recipe.augmentation), 48, 8, lambda _: ())(images()[0], 0, rng)
        return bool((METHODS["mmc"].draw(recipe, named(ARCHITECTURE), rng)[0] == ALIEN).any())

    by_noise = next(seed for seed in range(99) if not covers(seed))
    by_another = next(seed for seed in range(99) if covers(seed))
    masked_views.draw("mmc/toy", checkpoint, images()[:1], seed=by_noise)
    masked_views.draw("mmc/toy", checkpoint, images(), seed=by_another)
    with pytest.raises(UserError, match="another image, and only one was given"):
        masked_views.draw("mmc/toy", checkpoint, images()[:1], seed=by_another)


def test_the_recipe_is_the_one_of_the_training(tmp_path):
    origin = {"method": "mae", "recipe": "toy", "overrides": {"mask_ratio": "0.5", "arch": "vit_tiny_patch16_224"}}
    save_checkpoint(tmp_path / "mae.pt", tiny_backbone(), origin=origin)
    checkpoint = open_checkpoint(tmp_path / "mae.pt")
    name, row, recipe = masked_views.choose_recipe("mae", checkpoint)
    assert (name, row, recipe.mask_ratio, recipe.augmentation) == ("mae", "toy", 0.5, "toy-mae")
    assert masked_views.choose_recipe("mae/paper", checkpoint)[1:] == ("paper", METHODS["mae"].RECIPES["paper"])
    assert masked_views.choose_recipe("sdae", checkpoint)[1] == "paper"


def test_files_are_signed(tmp_path, tiny, cat):
    (found,) = show(tiny, [cat], options(tmp_path, kinds=["clusters"]))
    assert sheets.is_ours(found)
