"""Images of every mode and in every state become the right RGB pixels, or an error that names them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_images import picture, save

from ssl_bench.evaluate.decoding import BrokenImage, decode_image


def decoded(tmp_path: Path, image: Image.Image, suffix: str, **options: object) -> np.ndarray:
    """What comes back of an image that was saved."""
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    result = decode_image(path, shown_as="image")
    assert result.mode == "RGB"
    return np.asarray(result)


def test_modes(tmp_path: Path) -> None:
    rgb = picture(0)
    gray = rgb[..., 0]
    as_gray = np.stack([gray] * 3, axis=-1)
    alpha = np.full((4, 4), 7, np.uint8)
    palette = Image.fromarray(gray).convert("P")
    for suffix, image, expected in (
        ("png", Image.fromarray(rgb), rgb),
        ("png", Image.fromarray(np.dstack([rgb, alpha])), rgb),
        ("png", Image.fromarray(gray), as_gray),
        ("png", Image.fromarray(np.dstack([gray, alpha])), as_gray),
        ("png", palette, as_gray),
        ("png", Image.fromarray(gray > 127), np.where(as_gray > 127, 255, 0)),
        ("tif", Image.fromarray(255 - np.dstack([rgb, 255 + 0 * alpha]), mode=None).convert("RGBA"), 255 - rgb),
    ):
        np.testing.assert_array_equal(decoded(tmp_path, image, suffix), expected)
    np.testing.assert_array_equal(decoded(tmp_path, palette, "png", transparency=b"\0\1\2"), as_gray)
    cmyk = Image.frombytes("CMYK", (4, 4), np.dstack([255 - rgb, 0 * gray]).tobytes())
    np.testing.assert_array_equal(decoded(tmp_path, cmyk, "tif"), rgb)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 300], [32768, 65406, 65407, 65534, 65535]], dtype=np.uint16)
    result = decoded(tmp_path, Image.fromarray(values), suffix)
    np.testing.assert_array_equal(result[..., 1], [[0, 0, 1, 1, 1], [128, 254, 255, 255, 255]])


def test_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    for mode, kind in (("F", np.float32), ("I", np.int32)):
        Image.fromarray(np.full((4, 4), 0.5, kind)).save(tmp_path / "x.tif")
        with pytest.raises(BrokenImage, match=rf"32-bit pixels \(mode {mode}\), whose white is not defined"):
            decode_image(tmp_path / "x.tif", shown_as="x")


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("#ff0000", "#0000ff")]
    options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if suffix == "webp" else {})
    np.testing.assert_array_equal(decoded(tmp_path, frames[0], suffix, **options), np.asarray(frames[0]))


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    np.testing.assert_array_equal(decoded(tmp_path, Image.fromarray(picture(0)), "png", exif=exif), picture(0))


def test_truncated_images_are_broken(tmp_path: Path) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for suffix in ("jpg", "png", "gif", "bmp", "webp", "tif"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(picture(0, 64)).save(path)
        data = path.read_bytes()
        for part in (data[: len(data) // 2], data[:5], b""):
            path.write_bytes(part)
            with pytest.raises(BrokenImage, match=rf"cannot decode {path}: .+\. Expected a complete image"):
                decode_image(path, shown_as=str(path))
    with pytest.raises(BrokenImage, match="no such file or directory"):
        decode_image(tmp_path / "gone.png", shown_as="gone")


def test_decompression_bombs_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(BrokenImage, match=r"exceeds limit of 14 pixels"):
        decode_image(tmp_path / "x.png", shown_as="x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode_image(tmp_path / "x.png", shown_as="x")
    assert [warning.category for warning in seen] == [Image.DecompressionBombWarning]
