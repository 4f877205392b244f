"""Landmark datasets as they are distributed: what is read, what is refused, and that nothing in a pickle is run."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_bench.errors import UserError
from ssl_bench.evaluate import toy_landmarks
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.landmarks import LANDMARKS, open_landmarks
from ssl_bench.evaluate.toyworld import CLASSES, scene


def content():
    """Six database images and two queries, as plain lists."""
    return {
        "imlist": [f"db_{i}" for i in range(6)],
        "qimlist": ["q_a", "q_b"],
        "gnd": [
            {"bbx": [2.0, 3.4, 20.6, 18.0], "easy": [0, 3], "hard": [5], "junk": [1]},
            {"bbx": [0, 0, 32, 24], "easy": [], "hard": [2], "junk": []},
        ],
    }


def write(root: Path, listed=None, *, raw: bytes | None = None, name="roxford5k", suffix=".png", protocol=2) -> Path:
    """A dataset of noise, 32 x 24 px, in the layout in which it is distributed."""
    listed = content() if listed is None else listed
    (root / "jpg").mkdir(parents=True)
    rng = np.random.RandomState(0)
    for image in [*(f"db_{i}" for i in range(6)), "q_a", "q_b"]:
        Image.fromarray(rng.randint(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / "jpg" / f"{image}{suffix}")
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(listed, protocol) if raw is None else raw)
    return root


def lists_of(opened):
    return [[positions.tolist() for positions in truth] for truth in opened.truths]


EXPECTED = [[[0, 3], [5], [1]], [[], [2], []]]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPG"])
def test_images_boxes_and_lists_are_read(tmp_path, suffix):
    opened = open_landmarks(str(write(tmp_path / "oxford", suffix=suffix)))
    assert (opened.name, opened.built_in, opened.root) == ("roxford5k", False, tmp_path / "oxford")
    assert {name: len(split) for name, split in opened.splits.items()} == {"queries": 2, "database": 6}
    assert list(opened.database.sample_ids) == [f"db_{i}" for i in range(6)]
    assert list(opened.queries.sample_ids) == ["0000/q_a", "0001/q_b"]
    assert lists_of(opened) == EXPECTED
    whole = np.asarray(Image.open(tmp_path / "oxford" / "jpg" / f"q_a{suffix}").convert("RGB"))
    assert np.array_equal(opened.queries.image(0), whole[3:18, 2:21])  # 3.4 and 20.6 rounded
    assert np.array_equal(opened.whole_queries.image(0), whole)
    assert opened.queries.image(1).size == (32, 24)
    assert np.array_equal(
        opened.database.image(4), Image.open(tmp_path / "oxford" / "jpg" / f"db_4{suffix}").convert("RGB")
    )


def test_names_are_looked_for_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"'rparis6k'.*not in .*Expected .*rparis6k with gnd_rparis6k.pkl and jpg/"):
        open_landmarks("rparis6k")
    write(tmp_path / "rparis6k", name="rparis6k")
    assert open_landmarks("rparis6k").name == "rparis6k"


def test_names_with_a_suffix_and_an_image_that_is_queried_twice(tmp_path):
    listed = content()
    listed["imlist"][0] = "db_0.png"
    listed["qimlist"] = ["q_a", "q_a"]
    opened = open_landmarks(str(write(tmp_path / "d", listed)))
    assert opened.queries.image(0).size == (19, 15)
    assert opened.queries.image(1).size == (32, 24)
    assert len(set(opened.queries.sample_ids)) == 2
    assert opened.database.image(0).size == (32, 24)


def with_arrays(dtype):
    listed = content()
    for entry in listed["gnd"]:
        entry.update({key: np.array(entry[key], dtype=dtype) for key in ("easy", "hard", "junk")})
        entry["bbx"] = np.array(entry["bbx"], dtype=np.float32)
    return listed


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["i8", ">i4", "u2", "i1"])
def test_arrays_of_any_protocol_and_byte_order_are_read(tmp_path, protocol, dtype):
    opened = open_landmarks(str(write(tmp_path / "d", with_arrays(dtype), protocol=protocol)))
    assert lists_of(opened) == EXPECTED
    assert opened.queries.source.boxes.tolist() == [[2, 3, 21, 18], [0, 0, 32, 24]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_scalars_and_empty_arrays_of_floats_are_read(tmp_path, protocol):
    listed = content()
    listed["gnd"][0]["easy"] = [np.int64(0), np.int32(3)]
    listed["gnd"][0]["bbx"] = [np.float64(2.0), np.float32(3.4), 20.6, np.uint8(18)]
    listed["gnd"][1]["easy"] = np.empty(0)
    assert lists_of(open_landmarks(str(write(tmp_path / "d", listed, protocol=protocol)))) == EXPECTED


def test_both_names_of_numpys_core_are_known(tmp_path):
    """NumPy 1 called it numpy.core, NumPy 2 calls it numpy._core."""
    new = pickle.dumps(with_arrays("i8"), 2)
    old = new.replace(b"numpy._core.", b"numpy.core.")
    for number, raw in enumerate((old, old.replace(b"numpy.core.", b"numpy._core."))):
        assert lists_of(open_landmarks(str(write(tmp_path / str(number), raw=raw)))) == EXPECTED


def python2(value) -> bytes:
    """Opcodes as Python 2 wrote them at protocol 0: text is bytes, and arrays keep theirs in it."""
    if isinstance(value, dict):
        return b"(d" + b"".join(python2(key) + python2(each) + b"s" for key, each in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(python2(each) + b"a" for each in value)
    if isinstance(value, str):
        return f"S'{value}'\n".encode()
    if isinstance(value, np.ndarray):
        data = "".join(f"\\x{byte:02x}" for byte in value.tobytes())
        kind = f"cnumpy\ndtype\n(S'{value.dtype.str[1:]}'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        empty = "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        return f"{empty}(I1\n(I{len(value)}\nt{kind}I00\nS'{data}'\ntb".encode()
    return f"F{value}\n".encode() if isinstance(value, float) else f"I{value}\n".encode()


def test_what_python_2_wrote_is_read(tmp_path):
    listed = content()
    listed["gnd"][0]["easy"] = np.array([0, 3])
    listed["gnd"][0]["hard"] = np.array([5])
    listed["gnd"][0]["bbx"] = np.array([2.0, 3.4, 20.6, 18.0])  # with bytes beyond ASCII
    opened = open_landmarks(str(write(tmp_path / "d", raw=python2(listed) + b".")))
    assert lists_of(opened) == EXPECTED
    assert opened.queries.source.boxes[0].tolist() == [2, 3, 21, 18]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def sneaked(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


@pytest.mark.parametrize("where", ["instead", "inside"])
def test_a_malicious_pickle_is_refused_by_name_and_nothing_is_executed(tmp_path, where):
    trace = tmp_path / "executed"
    evil = Evil(os.system, f"touch {trace}")
    pickle.loads(pickle.dumps(evil))  # noqa: S301  (the attack is real)
    assert trace.exists()
    trace.unlink()
    listed = {"instead": evil, "inside": content() | {"cfg": evil}}[where]
    with pytest.raises(UserError, match=r"wants to call (posix|nt)\.system.*Nothing was executed"):
        open_landmarks(str(write(tmp_path / "d", listed)))
    assert not trace.exists()


def test_a_name_takes_the_ground_truth_of_that_name_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_BENCH_DATA", str(tmp_path))
    write(tmp_path / "roxford5k", name="rparis6k")
    with pytest.raises(UserError, match=r"expected one file gnd_NAME\.pkl"):
        open_landmarks("roxford5k")


def test_no_file_changes_a_stand_in(tmp_path):
    """BUILD with a state on what stands for a function of NumPy's."""
    raw = b"cnumpy.core.multiarray\n_reconstruct\n}S'__doc__'\nS'hacked'\nsb."
    write(tmp_path, raw=raw)
    with pytest.raises(UserError, match="wants to change a function"):
        open_landmarks(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy.core.multiarray", "dtype.__class__"),
        ("numpy.testing._private.utils", "runstring"),
        ("codecs", "open"),
        ("_codecs", "decode"),
        ("ssl_bench.evaluate.landmarks", "open_landmarks"),
    ],
)
def test_every_other_name_is_refused(tmp_path, module, name):
    with pytest.raises(UserError, match=f"wants to call {module}.{name}, which is refused"):
        open_landmarks(str(write(tmp_path / "d", raw=sneaked(module, name, "x"))))


def test_extensions_of_the_registry_are_refused_too(tmp_path):
    """Opcode EXT1 names a function by a number of this process's."""
    copyreg.add_extension("posix", "system", 200)
    try:
        with pytest.raises(UserError, match=r"posix\.system"):
            open_landmarks(str(write(tmp_path / "d", raw=b"\x80\x02\x82\xc8(S'true'\ntR.")))
    finally:
        copyreg.remove_extension("posix", "system", 200)


def forged(kind="S'i8'\nI0\nI1\n", shape="I2\n", data="\\x00" * 16) -> bytes:
    """An array whose parts do not fit each other, where NumPy's own code would trust them."""
    array = (
        "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        f"(I1\n({shape}tcnumpy\ndtype\n({kind}tR(I3\nS'<'\nNNNI-1\nI-1\nI63\ntbI00\nS'{data}'\ntb"
    ).encode()
    entry = b"(dS'bbx'\n" + python2([0, 0, 9, 9]) + b"sS'easy'\n" + array + b"sS'hard'\n(lsS'junk'\n(ls"
    return b"(dS'imlist'\n" + python2(["db_0"]) + b"sS'qimlist'\n" + python2(["q_a"]) + b"sS'gnd'\n(l" + entry + b"as."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (forged("S'O8'\nI0\nI1\n"), "an array of 'O8'"),
        (forged("S'V8'\nI0\nI1\n"), "an array of 'V8'"),
        (forged("(lI0\nI1\n"), r"an array of \[\]"),
        (forged(shape="I900000000\n"), "not a complete pickle"),
        (forged(data="\\x00" * 9), "not a complete pickle"),
        (b"", "not a complete pickle"),
        (pickle.dumps(content())[:-40], "not a complete pickle"),
        (b"<html>404</html>", "not a complete pickle"),
        (pickle.dumps([1, 2]), "holds list. Expected imlist, qimlist and gnd"),
        (pickle.dumps({"imlist": []}), "holds imlist. Expected imlist, qimlist and gnd"),
    ],
)
def test_damaged_and_forged_files_are_refused(tmp_path, raw, message):
    with pytest.raises(UserError, match=message):
        open_landmarks(str(write(tmp_path / "d", raw=raw)))


def test_a_forged_array_that_fits_is_read(tmp_path):
    """So that the test above is refused for what it forges."""
    with pytest.raises(UserError, match="share database images or name one twice"):  # two zeros
        open_landmarks(str(write(tmp_path / "d", raw=forged())))
    one = forged(shape="I1\n", data="\\x00" * 8)
    assert lists_of(open_landmarks(str(write(tmp_path / "e", raw=one)))) == [[[0], [], []]]


def changed(**fields):
    listed = content()
    listed["gnd"][0].update(fields)
    return listed


ORIGINAL = content() | {"gnd": [{"bbx": [0, 0, 9, 9], "ok": [0], "junk": []}] * 2}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (changed(easy=[0, 6]), r"query 0 \(q_a\): easy goes from 0 to 6\. Expected positions in imlist, 0 to 5"),
        (changed(hard=[-1]), "hard goes from -1 to -1"),
        (changed(easy=[0, 5]), "share database images or name one twice, such as number 5"),
        (changed(junk=[1, 1]), "share database images or name one twice, such as number 1"),
        (changed(junk=[0.5]), "junk is no list of whole numbers"),
        (changed(easy=[[0], [3]]), "easy is no list of whole numbers"),
        (changed(easy=[[0], [3, 4]]), "easy is no list of whole numbers"),
        (changed(easy=[True, False]), "easy is no list of whole numbers"),
        (changed(easy="03"), "easy is no list of whole numbers"),
        (changed(easy=None), "easy is no list of whole numbers"),
        (changed(easy=[2**70]), "easy is no list of whole numbers"),
        (changed(bbx=[1, 2, 3]), r"bbx is \[1, 2, 3\]. Expected four numbers"),
        (changed(bbx=[1, 2, float("nan"), 4]), "Expected four numbers"),
        (changed(bbx="1234"), "Expected four numbers"),
        (changed(bbx=[5, 5, 5, 9]), r"box of query 0, in q_a.png, is .*nothing of an image of 32 x 24 px"),
        (changed(bbx=[40, 2, 50, 9]), "nothing of an image of 32 x 24 px"),
        (changed(bbx=[9, 9, 3, 3]), "nothing of an image of 32 x 24 px"),
        (ORIGINAL, r"has bbx, ok, junk. Expected bbx, easy, hard and junk, as the \*revisited\* lists"),
        (content() | {"gnd": content()["gnd"][:1]}, "gnd has 1 entries for 2 queries"),
        (content() | {"gnd": {}}, "gnd has dict for 2 queries"),
        (content() | {"gnd": [None, None]}, "has NoneType. Expected bbx"),
        (content() | {"qimlist": []}, "qimlist is not a list of names"),
        (content() | {"imlist": "db_0"}, "imlist is not a list of names"),
        (content() | {"imlist": [1, 2]}, "imlist is not a list of names"),
        (content() | {"imlist": ["db_0"] * 6}, "imlist names an image twice"),
        (
            content() | {"imlist": [f"db_{i}" for i in range(9)]},
            r"3 of the listed images are not in .*db_6, db_7, db_8",
        ),
        (content() | {"qimlist": ["q_a", "gone"]}, "1 of the listed images are not in .*: gone"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, listed, message):
    with pytest.raises(UserError, match=message):
        open_landmarks(str(write(tmp_path / "d", listed)))


def test_a_box_over_the_border_is_cut_there_and_said(tmp_path):
    opened = open_landmarks(str(write(tmp_path / "d", changed(bbx=[-3.2, 4, 99, 20]))))
    assert opened.queries.image(0).size == (32, 16)
    assert opened.notes == ("1 boxes went over the border of their image and were cut there",)
    assert open_landmarks(str(write(tmp_path / "e"))).notes == ()


def test_folders_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'toy' is no landmark dataset.*toy-roxford, roxford5k, rparis6k"):
        open_landmarks("toy")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected one file gnd_NAME.pkl in .*has none.*queries with boxes.*roxford5k"):
        open_landmarks(str(tmp_path))
    both = write(tmp_path / "both")
    (both / "gnd_rparis6k.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 2: gnd_roxford5k.pkl, gnd_rparis6k.pkl"):
        open_landmarks(str(both))
    moved = write(tmp_path / "moved")
    (moved / "jpg").rename(moved / "images")
    with pytest.raises(UserError, match=r"there is no folder .*jpg"):
        open_landmarks(str(moved))


def test_a_query_that_is_no_image_is_named(tmp_path):
    root = write(tmp_path / "d")
    (root / "jpg" / "q_b.png").write_bytes(b"not an image")
    with pytest.raises(BrokenImage, match=r"q_b\.png"):
        open_landmarks(str(root))


def test_identity_holds_files_boxes_and_what_counts(tmp_path):
    base = open_landmarks(str(write(tmp_path / "a")))
    same = open_landmarks(str(write(tmp_path / "b")))
    box = open_landmarks(str(write(tmp_path / "c", changed(bbx=[2.0, 3.4, 20.6, 19.0]))))
    truth = open_landmarks(str(write(tmp_path / "d", changed(easy=[0], hard=[3, 5]))))
    swapped = open_landmarks(str(write(tmp_path / "e", changed(easy=[5], hard=[0, 3]))))
    manifests = [each.queries.manifest_sha256 for each in (base, box, truth, swapped)]
    assert len(set(manifests)) == 4
    assert same.queries.manifest_sha256 == base.queries.manifest_sha256
    assert {each.database.manifest_sha256 for each in (base, box, truth)} == {same.database.manifest_sha256}
    assert base.queries.freshness != base.whole_queries.freshness
    base_box = base.queries.source
    assert base_box.freshness() == type(base_box)(base_box.files, base_box.boxes.copy(), base.truths).freshness()
    assert base_box.freshness() != type(base_box)(base_box.files, base_box.boxes + 1, base.truths).freshness()


def test_a_limited_dataset_has_fewer_queries_and_the_whole_database(tmp_path):
    opened = open_landmarks(str(write(tmp_path / "d")))
    limited = opened.limited(1)
    assert {name: len(split) for name, split in limited.splits.items()} == {"queries": 1, "database": 6}
    assert lists_of(limited) == EXPECTED[:1]
    assert limited.queries.image(0).size == opened.queries.image(0).size == (19, 15)
    assert limited.queries.manifest_sha256 != opened.queries.manifest_sha256
    assert len(opened.limited(100).queries) == len(opened.limited(100).truths) == 2


# The toy landmarks


def test_toy_landmarks_are_built_in_and_made_once(own_cache, monkeypatch):
    """A tenth of them, for the time it takes; the whole is as large as it says."""
    whole = inspect.signature(toy_landmarks.write_landmarks).parameters
    assert LANDMARKS["toy-roxford"].startswith(
        f"the toy world: {whole['queries'].default} queries, {whole['database'].default} images"
    )
    tenth = functools.partial(toy_landmarks.write_landmarks, database=80, queries=10)
    monkeypatch.setattr(toy_landmarks, "write_landmarks", tenth)
    opened = open_landmarks("toy-roxford")
    assert (opened.name, opened.built_in, opened.root.parent) == ("toy-roxford", True, own_cache / "datasets")
    assert (len(opened.database), len(opened.queries)) == (80, 10)
    assert all(len(truth.easy) and len(truth.hard) for truth in opened.truths)
    monkeypatch.delattr(toy_landmarks, "write_landmarks")
    assert open_landmarks("toy-roxford").queries.manifest_sha256 == opened.queries.manifest_sha256


def test_toy_ground_truth_follows_from_the_pictures(tmp_path):
    """Drawn again one by one, with what a class is, where it is and how much of it shows read from the masks."""
    toy_landmarks.write_landmarks(tmp_path / "t", "t", database=40, queries=10)
    opened = open_landmarks(str(tmp_path / "t"))
    labels_of = [np.random.RandomState([0, index]).permutation(10).tolist() for index in range(50)]
    for query in range(10):
        queried = query % 10
        others = [label for label in labels_of[40 + query] if label != queried][:2]
        picture = scene(seed=0, split="test", index=40 + query, height_px=96, width_px=96, labels=(*others, queried))
        assert np.array_equal(opened.whole_queries.image(query), picture.image)
        rows, columns = np.nonzero(picture.instances[-1].mask)
        left, upper, right, lower = opened.queries.source.boxes[query].tolist()
        assert (left, upper) == (max(columns.min() - 12, 0), max(rows.min() - 12, 0))
        assert (right, lower) == (min(columns.max() + 13, 96), min(rows.max() + 13, 96))
        wanted = {"easy": [], "hard": [], "junk": []}
        for index in range(40):
            shown = tuple(labels_of[index][: 3 if index % 4 == 3 else 1])
            if queried not in shown:
                continue
            drawn = scene(seed=0, split="test", index=index, height_px=96, width_px=96, labels=shown)
            instance = drawn.instances[shown.index(queried)]
            covered, visible = instance.mask.mean(), instance.mask.sum() / instance.amodal.sum()
            relevance = "easy" if covered >= 0.1 and visible >= 0.9 else "hard"
            wanted["junk" if covered < 0.04 else relevance].append(index)
        assert lists_of(opened)[query] == [wanted["easy"], wanted["hard"], wanted["junk"]], CLASSES[queried]


def test_toy_landmarks_have_the_same_bytes_everywhere(tmp_path):
    reports = []
    for name in ("a", "b"):
        folder = tmp_path / name
        toy_landmarks.write_landmarks(folder, "t", database=20, queries=2, progress=lambda *at: reports.append(at))
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).rglob("*.p*")}
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 23
    assert reports[:22] == [(done, 22) for done in range(1, 23)]
    # Whoever changes these raises LAYOUT_VERSION (or the world's), so that cached datasets are made anew.
    assert toy_landmarks.LAYOUT_VERSION == 1
    listed = pickle.loads((tmp_path / "a" / "gnd_t.pkl").read_bytes())  # noqa: S301  (ours)
    assert hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16] == "49bb025814ff3e6c"
    assert hashes[0]["query_000001.png"][:16] == "ad6dd859fca2c2ba"
