"""Every layout of annotated videos as it is distributed, and what is wrong with the files that people have."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import videos as videos_module
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.video_masks import PALETTE, mask_png, read_mask
from ssl_bench.evaluate.videos import looks_like_videos, open_videos, read_objects

HEIGHT, WIDTH = 6, 8


def mask_of(*numbers):
    """A mask with a column for every number."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for column, number in enumerate(numbers):
        mask[1:4, column] = number
    return mask


def save_mask(path, mask, *, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if mode == "P":
        image.putpalette(PALETTE.tobytes())
    image.save(path)


def add_video(root, name, masks, *, frames=None, resolution="480p", size=(WIDTH, HEIGHT)):
    """A video with these masks (None: no mask); `frames` of them, gray by their number."""
    for number in range(len(masks) if frames is None else frames):
        frame = root / "JPEGImages" / resolution / name / f"{number:05d}.jpg"
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * number, 20, 30)).save(frame)
    for number, mask in enumerate(masks):
        if mask is not None:
            save_mask(root / "Annotations" / resolution / name / f"{number:05d}.png", mask)
    return root


def add_list(root, file, *lines):
    path = root / "ImageSets" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def davis_2017(root):
    add_video(root, "bear", [mask_of(1, 2)] * 3)
    add_video(root, "swan", [mask_of(1, 2, 3)] * 2)
    add_video(root, "boat", [mask_of(1)] * 4)
    add_list(root, "2017/val.txt", "swan", "bear")
    add_list(root, "2017/train.txt", "boat", "")
    add_list(root, "2016/val.txt", "boat", "bear")
    return root


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("place", ["davis-2017", "davis-2017/DAVIS", "DAVIS", "davis"])
def test_davis_2017_by_name(place, data):
    davis_2017(data / place)
    videos = open_videos("davis-2017")
    assert (videos.name, videos.built_in, videos.notes) == ("davis-2017", False, ())
    assert [video.name for video in videos.videos["val"]] == ["swan", "bear"]  # as listed
    assert [video.frames for video in videos.videos["val"]] == [range(0, 2), range(2, 5)]
    assert list(videos.splits["val"].sample_ids) == [
        *("swan/00000", "swan/00001"),
        *("bear/00000", "bear/00001", "bear/00002"),
    ]
    assert [video.name for video in videos.videos["train"]] == ["boat"]
    assert abs(videos.splits["val"].image(4).getpixel((0, 0))[0] - 20) < 3
    objects = [read_objects(video) for video in videos.videos["val"]]
    assert [each.count for each in objects] == [3, 2]
    np.testing.assert_array_equal(objects[0].first, mask_of(1, 2, 3))
    np.testing.assert_array_equal(objects[1].mask(2), mask_of(1, 2))
    assert videos.videos["val"][0].stems == ("00000", "00001")
    videos.verify("val")


def test_davis_2016_is_one_object_a_video(data):
    davis_2017(data / "DAVIS")  # the masks of 2017 with the lists of 2016
    videos = open_videos("davis-2016")
    assert [video.name for video in videos.videos["val"]] == ["boat", "bear"]
    save_mask(data / "DAVIS/Annotations/480p/bear/00001.png", mask_of(1, 2, 255))  # void is no part of the object
    objects = read_objects(videos.videos["val"][1])
    assert (objects.count, objects.absent, objects.numbers) == (1, (), (1, 2))
    np.testing.assert_array_equal(objects.mask(1), mask_of(1, 1, 0))
    # DAVIS 2016 itself, which wins: 0 and 255, and lists of paths
    add_video(data / "davis-2016", "goat", [mask_of(255, 255), mask_of(255), mask_of()])
    add_list(data / "davis-2016", "480p/val.txt", *(f"/JPEGImages/480p/goat/0000{k}.jpg /x/{k}.png" for k in range(3)))
    (video,) = open_videos("davis-2016").videos["val"]
    objects = read_objects(video)
    assert (video.name, objects.count, objects.is_binary) == ("goat", 1, True)
    np.testing.assert_array_equal(objects.first, mask_of(1, 1))
    np.testing.assert_array_equal(objects.mask(1), mask_of(1))
    assert objects.mask(2).max() == 0
    (again,) = open_videos(str(data / "davis-2016")).videos["val"]  # the same by its path
    assert (again.name, read_objects(again).count) == ("goat", 1)


@pytest.mark.parametrize("resolution", ["480p", "Full-Resolution", "."])
def test_any_folder_of_frames_and_masks(resolution, tmp_path):
    add_video(tmp_path, "b", [mask_of(1)] * 2, resolution=resolution)
    add_video(tmp_path, "a", [mask_of(1, 2)] * 3, resolution=resolution)
    assert looks_like_videos(tmp_path)
    videos = open_videos(str(tmp_path))
    assert videos.name == tmp_path.name
    assert [video.name for video in videos.videos["val"]] == ["a", "b"]
    assert list(videos.splits) == ["val"]


@pytest.mark.parametrize(
    "stems",  # in order
    [
        ["0", "1", "2", "9", "10", "11", "100"],
        ["frame8_left", "frame9_left", "frame10_left"],
        ["00008", "00009", "00010"],
        ["v2_9", "v2_10"],
        ["0a", "10", "1f", "a1"],  # they differ in more than a number: as text
        ["b-12", "b-2", "c-1"],
    ],
)
def test_frames_are_in_the_order_of_their_numbers(stems, tmp_path):
    for number, stem in sorted(enumerate(stems), key=lambda each: -each[0]):
        frame = tmp_path / f"JPEGImages/a/{stem}.png"
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (WIDTH, HEIGHT), number).save(frame)
        mask = mask_of(1)
        mask[5, 0] = number > 3
        save_mask(tmp_path / f"Annotations/a/{stem}.png", mask)
    videos = open_videos(str(tmp_path))
    (video,) = videos.videos["val"]
    assert list(video.stems) == stems
    assert [videos.splits["val"].image(k).getpixel((0, 0))[0] for k in video.frames] == list(range(len(stems)))
    assert [path.rpartition("/")[2] for path in video.masks] == [f"{stem}.png" for stem in stems]
    assert [int(read_objects(video).mask(k)[5, 0]) for k in video.frames] == [int(k > 3) for k in video.frames]


def test_masks_are_paired_with_frames_by_name():
    """Whatever the order in which either is listed."""
    images, masks = {"1": "1.jpg", "2": "2.jpg"}, {"2": "2.PNG", "1": "1.png"}
    assert videos_module._own_masks(images, masks, Path("frames"), Path("m")) == ("m/1.png", "m/2.PNG")


def test_what_is_told_of_a_limit_and_of_identity(tmp_path):
    videos = open_videos(str(davis_2017(tmp_path)))
    short = videos.limited(1)
    assert [video.name for video in short.videos["val"]] == ["swan"]
    assert list(short.splits["val"].sample_ids) == ["swan/00000", "swan/00001"]
    assert len(videos.limited(9).splits["val"]) == 5
    first = videos.splits["val"].manifest_sha256
    assert open_videos(str(tmp_path)).splits["val"].manifest_sha256 == first != short.splits["val"].manifest_sha256
    path = tmp_path / "Annotations/480p/bear/00001.png"
    size = path.stat().st_size
    save_mask(path, mask_of(2, 1))  # another object, in as many bytes
    assert path.stat().st_size == size
    assert open_videos(str(tmp_path)).splits["val"].manifest_sha256 != first


# Numbers -------------------------------------------------------------------------------------------------------------


def first_objects(tmp_path, *masks):
    add_video(tmp_path, "a", list(masks))
    return read_objects(open_videos(str(tmp_path)).videos["val"][0])


def test_objects_are_those_of_the_first_mask(tmp_path):
    """davis2017-evaluation counts up to the highest number of the first mask; void and later ones are background."""
    objects = first_objects(tmp_path, mask_of(1, 3, 255), mask_of(3, 4, 255, 1), mask_of(2, 5), mask_of())
    assert (objects.count, objects.absent, objects.is_binary) == (3, (2,), False)
    np.testing.assert_array_equal(objects.first, mask_of(1, 3, 0))
    np.testing.assert_array_equal(objects.mask(1), mask_of(3, 0, 0, 1))
    np.testing.assert_array_equal(objects.mask(2), mask_of(2, 0))
    assert objects.mask(3).max() == 0
    assert objects.late == {4, 5}


def test_rgb_masks_are_read_by_their_colors(tmp_path):
    several = (20, *range(1, 20, 2))  # half of the numbers up to 20
    wide = np.full((2, len(several)), several, np.uint8)
    add_video(tmp_path, "a", [wide] * 2)
    path = tmp_path / "Annotations/480p/a/00000.png"
    colors = PALETTE[wide]
    assert colors[1, several.index(9)].tolist() == [192, 0, 0]
    for value in (192, 191):  # DAVIS' own files have 191
        save_mask(path, np.where(colors == 192, value, colors).astype(np.uint8), mode="RGB")
        objects = read_objects(open_videos(str(tmp_path)).videos["val"][0])
        np.testing.assert_array_equal(objects.first, wide)
    white = np.where(wide[..., None] > 10, np.uint8([255, 255, 255, 255]), np.uint8([0, 0, 0, 255]))
    save_mask(path, white, mode="RGBA")
    objects = read_objects(open_videos(str(tmp_path)).videos["val"][0])
    assert objects.is_binary
    colors[1, 0] = (1, 2, 3)
    save_mask(path, colors, mode="RGB")
    with pytest.raises(UserError, match=r"a/00000.png is an RGB image with 1 colors.*#010203"):
        read_objects(open_videos(str(tmp_path)).videos["val"][0])


def test_masks_of_other_modes(tmp_path):
    add_video(tmp_path, "a", [mask_of(1)] * 2)
    path = tmp_path / "Annotations/480p/a/00000.png"

    def read():
        return read_objects(open_videos(str(tmp_path)).videos["val"][0])

    save_mask(path, mask_of(1, 2), mode="L")
    assert read().count == 2
    Image.fromarray(mask_of(255)).convert("1").save(path)
    assert read().is_binary
    Image.fromarray(mask_of(1).astype(np.uint16)).save(path)
    with pytest.raises(UserError, match=r"00000.png is a mask of mode I"):
        read()
    save_mask(path, mask_of(38, 75), mode="L")  # the luminance of red and green
    with pytest.raises(UserError, match=r"00000.png numbers its objects 38, 75.*save it with its palette"):
        read()
    save_mask(path, mask_of(2))  # one of the two numbers up to 2
    assert (read().count, read().absent) == (2, (1,))
    for empty in (mask_of(), mask_of(0, 0)):
        save_mask(path, empty)
        with pytest.raises(UserError, match=r"00000.png shows no object"):
            read()
    path.write_bytes(b"no image")
    with pytest.raises(BrokenImage, match=r"00000.png.*the mask cannot be read"):
        read()


@pytest.mark.parametrize(
    ("numbers", "mode", "advice"),
    [
        ((15,), "P", "from 1 on, in all of its masks"),  # a person, in PASCAL VOC
        ((3,), "P", "from 1 on"),
        ((1, 5), "P", "from 1 on"),
        ((1, 5), "L", "with its palette"),
        ((1, 5), "RGB", "the first colors of the palette"),
    ],
)
def test_numbers_with_gaps_are_refused(numbers, mode, advice, tmp_path):
    """Each number below the highest that is nowhere would count 100, whatever was found."""
    add_video(tmp_path, "a", [mask_of(*numbers)] * 3)
    mask = mask_of(*numbers)
    save_mask(tmp_path / "Annotations/480p/a/00000.png", PALETTE[mask] if mode == "RGB" else mask, mode=mode)
    with pytest.raises(UserError, match=rf"00000.png numbers its objects {numbers[0]}.*{advice}"):
        read_objects(open_videos(str(tmp_path)).videos["val"][0])
    save_mask(tmp_path / "Annotations/480p/a/00000.png", mask_of(1, 4, 2))  # the 3 alone is absent
    assert read_objects(open_videos(str(tmp_path)).videos["val"][0]).absent == (3,)


def test_void_is_not_the_object(tmp_path):
    """An object that is 1 in the first mask and 255 later on would vanish; where 255 is known to be void, it may."""
    for name, masks in {
        "y": [mask_of(1), mask_of(255), mask_of(255)],
        "z": [mask_of(1, 2), mask_of(255), mask_of(255)],
        "b": [mask_of(1), mask_of(0), mask_of(255)],
        "c": [mask_of(1, 255), mask_of(0, 255), mask_of(255)],
        "d": [mask_of(1), mask_of(1, 255), mask_of()],
        "e": [mask_of(1, 2), mask_of(2), mask_of(255)],
        "f": [mask_of(255), mask_of(1), mask_of(255)],
    }.items():
        add_video(tmp_path, name, masks)
    *others, first, several = open_videos(str(tmp_path)).videos["val"]
    with pytest.raises(UserError, match=r"shows numbers \(1, 2\), and .*00001.png nothing but 255"):
        read_objects(several)
    with pytest.raises(
        UserError, match=r"y/00000.png shows numbers \(1\), and .*y/00001.png nothing but 255.*with 0 and 1"
    ):
        read_objects(first)
    read = {video.name: read_objects(video) for video in others}
    shown = {name: [int(objects.mask(frame).max()) for frame in (1, 2)] for name, objects in read.items()}
    assert shown == {"b": [0, 0], "c": [0, 0], "d": [1, 0], "e": [2, 0], "f": [1, 1]}
    assert {name for name, objects in read.items() if objects.only_void == {2}} == {"b", "e"}
    assert not any(read[name].only_void for name in "cdf")


def test_masks_with_alpha_and_bad_headers(tmp_path):
    add_video(tmp_path, "a", [mask_of(255)] * 3)
    path = tmp_path / "Annotations/480p/a/00002.png"
    Image.fromarray(mask_of(255)).convert("LA").save(path)  # as tools for DAVIS 2016 write them
    videos = open_videos(str(tmp_path))
    videos.verify("val")
    np.testing.assert_array_equal(read_objects(videos.videos["val"][0]).mask(2), mask_of(1))
    Image.fromarray(mask_of(1).astype(np.uint16)).save(path)
    with pytest.raises(UserError, match=r"00002.png is a mask of mode I"):  # before a frame is followed
        videos.verify("val")
    header = b"IHDRabc"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 3) + header + struct.pack(">I", zlib.crc32(header)))
    with pytest.raises(BrokenImage, match=r"00002.png: its header cannot be read \(Truncated IHDR"):
        videos.verify("val")
    with pytest.raises(BrokenImage, match=r"00002.png: the mask cannot be read \(Truncated IHDR"):
        read_objects(videos.videos["val"][0]).mask(2)


def test_masks_are_written_as_they_are_read(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(mask_png(mask_of(1, 7, 255)))
    np.testing.assert_array_equal(read_mask(str(path)), mask_of(1, 7, 255))


def test_gray_and_cmyk_frames(tmp_path):
    add_video(tmp_path, "a", [mask_of(1)] * 2)
    folder = tmp_path / "JPEGImages/480p/a"
    Image.new("L", (WIDTH, HEIGHT), 77).save(folder / "00000.jpg")
    Image.new("CMYK", (WIDTH, HEIGHT), (0, 0, 0, 0)).save(folder / "00001.jpg")
    split = open_videos(str(tmp_path)).splits["val"]
    assert split.image(0).getpixel((2, 2)) == (77, 77, 77)
    assert min(split.image(1).getpixel((2, 2))) > 250
    open_videos(str(tmp_path)).verify("val")


# What does not fit ---------------------------------------------------------------------------------------------------


def test_masks_of_the_first_frame_alone(tmp_path):
    add_video(tmp_path, "a", [mask_of(1)], frames=3)
    add_video(tmp_path, "b", [mask_of(1)])
    add_list(tmp_path, "2017/test-dev.txt", "a", "b")
    videos = open_videos(str(tmp_path))
    assert [video.is_annotated for video in videos.videos["test-dev"]] == [False, True]
    assert list(videos.splits) == ["test-dev"]
    videos.verify("test-dev")
    assert videos.splits["test-dev"].image(2).size == (WIDTH, HEIGHT)


def test_frames_and_masks_of_another_number(tmp_path):
    first_missing = add_video(tmp_path / "a", "x", [None, mask_of(1)])
    with pytest.raises(UserError, match=r"first frame of .*x has no mask: .*x/00000.png is missing"):
        open_videos(str(first_missing))
    some_missing = add_video(tmp_path / "b", "x", [mask_of(1), None, mask_of(1), None])
    with pytest.raises(UserError, match=r"2 of 4 frames of .*x have no mask .*00001, 00003"):
        open_videos(str(some_missing))
    too_many = add_video(tmp_path / "c", "x", [mask_of(1)] * 3, frames=2)
    with pytest.raises(UserError, match=r"1 masks of .*x have no frame in .*x: 00002"):
        open_videos(str(too_many))
    add_video(tmp_path / "d", "x", [mask_of(1)])
    for path in (tmp_path / "d/JPEGImages/480p/x").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"JPEGImages/480p/x has no frames"):
        open_videos(str(tmp_path / "d"))


def test_frames_and_masks_of_another_size(tmp_path):
    add_video(tmp_path, "a", [mask_of(1)] * 3)
    frame = tmp_path / "JPEGImages/480p/a/00001.jpg"
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(frame)
    videos = open_videos(str(tmp_path))
    expected = r"00001.jpg has 8 x 7 px, and .*Annotations/480p/a/00000.png has 8 x 6 px"
    with pytest.raises(UserError, match=expected):
        videos.verify("val")
    with pytest.raises(BrokenImage, match=r"00001.jpg: it has 8 x 7 px, and its mask .*00001.png has 8 x 6 px"):
        videos.splits["val"].image(1)  # which `ssl-bench data check` sees
    Image.new("RGB", (WIDTH, HEIGHT)).save(frame)
    save_mask(tmp_path / "Annotations/480p/a/00002.png", mask_of(1)[:5])
    with pytest.raises(UserError, match=r"00002.png has 8 x 5 px, and .*00000.png has 8 x 6 px"):
        videos.verify("val")
    with pytest.raises(UserError, match=r"00002.png has 8 x 5 px"):
        read_objects(videos.videos["val"][0]).mask(2)
    save_mask(tmp_path / "Annotations/480p/a/00002.png", mask_of(1))
    frame.write_bytes(b"no image")
    with pytest.raises(BrokenImage, match=r"00001.jpg: its header cannot be read"):
        videos.verify("val")


def test_what_is_not_there(data, tmp_path):
    with pytest.raises(UserError, match=r"'davis-2017' .* is not in .*ImageSets/2017/val.txt.*SSL_BENCH_DATA"):
        open_videos("davis-2017")
    with pytest.raises(UserError, match=r"ImageSets/2016/val.txt or ImageSets/480p/val.txt"):
        open_videos("davis-2016")
    with pytest.raises(UserError, match=r"there is no folder nowhere. Expected one of toy-davis"):
        open_videos("nowhere")
    root = davis_2017(tmp_path / "outer" / "DAVIS")
    with pytest.raises(
        UserError, match=r"outer has no such folders.*JPEGImages/480p.*It looks as if .*DAVIS were meant"
    ):
        open_videos(str(root.parent))
    add_list(root, "2017/val.txt", "bear", "wolf")
    with pytest.raises(UserError, match=r"there is no folder .*JPEGImages/480p/wolf"):
        open_videos(str(root))
    add_list(root, "2017/val.txt")
    with pytest.raises(UserError, match=r"val.txt names no video"):
        open_videos(str(root))
    add_list(root, "2017/val.txt", "bear")
    add_list(root, "2017/train.txt", "wolf", "fox")  # the training videos were not unpacked
    videos = open_videos(str(root))
    assert list(videos.splits) == ["val"]
    assert "none of the 2 videos of train" in videos.notes[0]
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/480p/bear/00000.png")
    with pytest.raises(UserError, match=r"several files of one name"):
        open_videos(str(root))


def test_folders_without_a_video(tmp_path):
    root = add_video(tmp_path, "a", [mask_of(1)] * 2)
    (root / "JPEGImages/480p/.cache").mkdir()
    videos = open_videos(str(root)).limited(5)
    assert [video.name for video in videos.videos["val"]] == ["a"]
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p/a").rename(root / f"{kind}-a")
    with pytest.raises(UserError, match=r"JPEGImages/480p has no folder with the frames of a video. Expected one of"):
        open_videos(str(root))
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p").rename(root / kind / ".480p")
    assert not looks_like_videos(root)


def test_lists_of_other_editors(tmp_path):
    root = davis_2017(tmp_path)
    path = root / "ImageSets/2017/val.txt"
    path.write_bytes("swan\r\nbear\r\n".encode("utf-8-sig"))
    assert [video.name for video in open_videos(str(root)).videos["val"]] == ["swan", "bear"]
    path.write_bytes("b\xe4r\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"2017/val.txt is not text in UTF-8. Expected a name a line"):
        open_videos(str(root))


def test_pascal_voc_is_no_dataset_of_videos(tmp_path):
    for folder, file in (("JPEGImages", "2007_000032.jpg"), ("Annotations", "2007_000032.xml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    assert not looks_like_videos(tmp_path)
