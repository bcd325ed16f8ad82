"""Bad records: each is listed once with its reason and replaced by the next position's, every time the same."""

import csv
import io
import json
import pathlib
import resource
import struct
import types
import zlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from imagegpt_jax.data import images, quarantine, shards, sources
from imagegpt_jax.data.pipeline import Batches, position_after
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import event_log


def picture(seed, size=(24, 24)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def bomb():
    """A PNG of a few hundred bytes that says it has 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def scrambled(data):
    """The same header and end, and noise in between."""
    middle = np.random.default_rng(1).integers(0, 255, len(data) - 200, np.uint8).tobytes()
    return data[:100] + middle + data[-100:]


def files():
    """File name -> (bytes, a word of the reason)."""
    jpeg = encoded(picture(0, (64, 64)), "JPEG", quality=95)
    png = encoded(picture(1, (64, 64)), "PNG")
    frames = [picture(i) for i in range(3)]
    wide = Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 100)
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "scrambled.png": (scrambled(png), "cannot be processed"),
        "truncated.bmp": (encoded(picture(0, (64, 64)), "BMP")[:300], "cannot be processed (a damaged image"),
        "truncated.tif": (encoded(picture(0, (64, 64)), "TIFF")[:300], "cannot be processed (a damaged image"),
        "truncated.webp": (encoded(picture(0, (64, 64)), "WEBP", lossless=True)[:3000], "not a sound image"),
        "empty.jpg": (b"", "not a sound image"),
        "text.png": (b"this is no picture", "not a sound image"),
        "cmyk.jpg": (encoded(picture(2).convert("CMYK"), "JPEG"), "CMYK"),
        "deep.png": (encoded(wide, "PNG"), "16 bits"),
        "animated.gif": (encoded(frames[0], "GIF", **animated), "animation"),
        "animated.webp": (encoded(frames[0], "WEBP", **animated), "animation"),
        "one.png": (encoded(picture(3, (1, 1)), "PNG"), "thin"),
        "thin.png": (encoded(picture(4, (1, 10_000)), "PNG"), "thin"),
        "bomb.png": (bomb(), "bomb"),
        "really_png.jpg": (encoded(picture(5), "PNG"), "wrong extension"),
        "latin.png": (encoded(picture(6), "PNG"), "not UTF-8"),
        "long.png": (encoded(picture(7), "PNG"), "1048576 bytes"),
    }


def captions():
    """Sidecar name -> bytes."""
    return {"latin.txt": "Caf\xe9".encode("latin-1"), "long.txt": b"x" * (1 << 20)}


def write_folder(folder, good):
    """A folder of `good` sound pictures with captions, and one of each kind above among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(good):
        (folder / f"good{i:04}.png").write_bytes(encoded(picture(100 + i), "PNG"))
        (folder / f"good{i:04}.txt").write_text(f"picture {i}")
    for name, (data, _) in files().items():
        (folder / name).write_bytes(data)
        (folder / f"{name.rsplit('.', 1)[0]}.txt").write_text("a caption")
    for name, data in captions().items():
        (folder / name).write_bytes(data)
    return folder


OPS = "decode|resize(16)|value_range(-1,1)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hostile") / "data", good=60)


def opened(folder, max_share=0.5, accept=(), report=None):
    source = sources.open_source(f"folder:{folder}")
    source.quarantine = quarantine.Quarantine(max_share, accept, report)
    return source


def read(source, batches=20, **settings):
    stream = Batches(source, ops=OPS, batch_size=8, **settings)
    results = [next(stream) for _ in range(batches)]
    stream.close()
    return results


def test_every_kind_is_listed_once_with_its_reason(folder):
    reports = []
    read(opened(folder, report=lambda *line: reports.append(line)))
    expected = {name: word for name, (_, word) in files().items()}
    assert sorted(name for name, _ in reports) == sorted(expected)
    for name, reason in reports:
        assert expected[name] in reason, (name, reason)


def test_bad_records_are_replaced_by_the_next_position_and_all_else_stays(folder):
    plain = sources.open_source(f"folder:{folder}")
    bad = set(files())
    clean = read(opened(folder))
    # What each position is without looking at any picture.
    names = [b["id"] for b in read_ids(plain, 21 * 8)]
    for number, batch in enumerate(clean):
        for row, (name, position) in enumerate(zip(batch["id"], batch["position"], strict=True)):
            assert position == number * 8 + row
            expected = next(n for n in names[position:] if n not in bad)
            assert name == expected


def read_ids(source, count):
    stream = Batches(source, batch_size=1, columns=())
    for _ in range(count):
        yield {"id": str(next(stream)["id"][0])}
    stream.close()


def test_the_same_twice_and_from_the_middle(folder):
    first, again = read(opened(folder)), read(opened(folder))
    middle = read(opened(folder), batches=12, position=8 * 8)
    for a, b in [*zip(first, again, strict=True), *zip(first[8:], middle, strict=True)]:
        assert a["id"].tolist() == b["id"].tolist()
        np.testing.assert_array_equal(a["image"], b["image"])


def test_halves_of_the_batch_make_the_whole(folder):
    whole = read(opened(folder))
    halves = [read(opened(folder), rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    for batch, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([p["image"] for p in parts]))


def test_an_evaluation_counts_no_example_twice(folder):
    batches = list(Batches(opened(folder), ops=OPS, batch_size=8, shuffle=False, epochs=1))
    names = [name for b in batches for name, counts in zip(b["id"], b["mask"], strict=True) if counts]
    assert sorted(names) == [f"good{i:04}.png" for i in range(60)]


def test_kinds_that_are_accepted_are_used(folder):
    reports = []
    source = opened(folder, accept=quarantine.KINDS, report=lambda *line: reports.append(line[0]))
    used = {name for batch in read(source) for name in batch["id"]}
    decodable = {"cmyk.jpg", "deep.png", "animated.gif", "animated.webp", "one.png", "thin.png", "really_png.jpg"}
    assert decodable <= used
    assert not decodable & set(reports)


def test_too_many_bad_records_stop_with_a_summary(folder):
    with pytest.raises(UserError, match=r"of the first \d+ examples are bad \(.*2 x an animation.*max_share=0.1"):
        read(opened(folder, max_share=0.1), batches=60)


def test_without_a_quarantine_the_first_bad_record_stops(folder):
    with pytest.raises(UserError, match="image '.*' of folder:"):
        read(sources.open_source(f"folder:{folder}"))


def test_a_misspelt_kind_is_an_error():
    with pytest.raises(UserError, match="'cymk'. Did you mean 'cmyk'"):
        quarantine.Quarantine(accept=("cymk",))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_captions_of_a_metadata_file_are_judged_as_others_are(form, tmp_path):
    captions = {"good.png": "a cat", "long.png": "x" * (1 << 20), "null.png": "a\0b", "half.png": "\ud83d"}
    for name in captions:
        (tmp_path / name).write_bytes(encoded(picture(0), "PNG"))
    if form == "csv":
        captions["half.png"] = "caf\udce9"  # one byte of Latin-1
        with (tmp_path / "metadata.csv").open("w", newline="", errors="surrogateescape") as file:
            csv.writer(file).writerows([("file_name", "text"), *captions.items()])
    else:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = sources.open_source(f"folder:{tmp_path}")
    refused = {r["id"]: quarantine.refuse(r) for r in source.__getitems__(range(4))}
    assert refused == {
        "good.png": None,
        "null.png": None,
        "long.png": "a caption of 1048576 bytes: at most 65536",
        "half.png": "a caption that is not UTF-8",
    }


def test_a_metadata_file_that_nests_too_deep_is_one_sentence(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0), "PNG"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: not JSON"):
        sources.open_source(f"folder:{tmp_path}")


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded(picture(0), "PNG"))
        (tmp_path / f"{name}.txt").write_text("a cat")
    with (tmp_path / "b.txt").open("r+b") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    source = sources.open_source(f"folder:{tmp_path}")
    assert source.__getitems__([0])[0]["captions"] == ["a cat"]
    with pytest.raises(UserError, match=r"b.txt has 1099511627776 bytes"):
        source.__getitems__([1])


@pytest.mark.parametrize("form", ["EPS", "ICO", "PPM", "TGA"])
def test_formats_that_no_picture_has_are_given_to_no_decoder(form):
    """An EPS is a program: Pillow would have Ghostscript run it."""
    data = encoded(picture(0), form)
    assert quarantine.refuse({"id": "x", "image": data}) == "not a sound image: of no known format"
    with pytest.raises(ValueError, match="known format"):
        images.decode_image(data)


def broken(data, rng):
    """Bytes as disks and networks leave them: cut, changed, with something put in or left out."""
    data, place, kind = bytearray(data), int(rng.integers(len(data))), int(rng.integers(4))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        for near in rng.integers(0, min(len(data), int(rng.choice([40, 200, len(data)]))), int(rng.integers(1, 6))):
            data[near] = int(rng.choice([0, 255, rng.integers(256)]))
    elif kind == 2:
        data[place:place] = rng.bytes(int(rng.integers(1, 50)))
    else:
        del data[place : place + int(rng.integers(1, 30))]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_whatever_the_bytes_are_there_is_a_picture_or_a_reason():
    rng = np.random.default_rng(0)
    image, turned = picture(0, (40, 40)), b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    several = {"save_all": True, "append_images": [image.rotate(9)]}
    sound = [
        *(encoded(image, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
        *(encoded(image, form, **several) for form in ("PNG", "WEBP", "GIF", "TIFF")),
        encoded(image, "JPEG", exif=turned),
        encoded(image.convert("CMYK"), "JPEG"),
        *(encoded(image.convert(mode), "PNG") for mode in ("P", "1", "RGBA")),
        *(encoded(image, "TIFF", compression=how) for how in ("tiff_lzw", "jpeg")),
    ]
    refused = undecodable = 0
    for number in range(250 * len(sound)):
        data = broken(sound[number % len(sound)], rng)
        if (reason := quarantine.refuse({"id": "x", "image": data})) is not None:
            refused += 1
            assert reason
            continue
        images.sniff(data)
        try:
            assert images.decode_image(data).dtype == np.uint8
        except ValueError:
            undecodable += 1
    assert refused > 1000
    assert undecodable > 200


def test_a_corrupt_block_of_an_array_record_is_put_aside(tmp_path):
    records = [
        {"id": str(i), "image": encoded(picture(i, (64, 64)), "PNG"), "captions": [f"picture {i}"]} for i in range(40)
    ]
    ranges = shards.shard_ranges(len(records), len(records))
    writer = shards.ShardWriter(tmp_path / "packed", "train", ranges, kind="images", made_from="here")
    writer.write(0, records)
    writer.finish()
    path = max((tmp_path / "packed").glob("*.array_record*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    path.write_bytes(bytes(data))
    reports = []
    source = sources.open_source(f"array_record:{tmp_path / 'packed'}")
    source.quarantine = quarantine.Quarantine(0.9, (), lambda *line: reports.append(line))
    used = {name for batch in read(source, batches=10) for name in batch["id"]}
    assert reports
    assert all("damaged" in reason for _, reason in reports)
    assert len(used) + len(reports) == 40


def test_memory_stays_bounded(folder):
    """The bomb would take 7.5 GB, and the long caption a megabyte for every time it is drawn."""
    read(opened(folder), batches=5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(opened(folder), batches=40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_the_list_of_a_workdir_has_each_record_once(tmp_path):
    for process in (0, 1):
        report = quarantine.Report(tmp_path, process, event_log.Log(tmp_path))
        for _ in range(2):  # the training set, and the validation set of the same folder
            source = types.SimpleNamespace(name="folder:x")
            quarantine.attach({"train": source}, ConfigDict({"max_share": 0.5, "accept": ()}), report)
            source.quarantine.add(3, "a.png", "torn")
            source.quarantine.add(3, "a.png", "torn")
    lines = [json.loads(x) for p in tmp_path.glob("quarantine*.jsonl") for x in p.read_text().splitlines()]
    assert lines == [{"source": "folder:x", "id": "a.png", "reason": "torn"}]
    assert [e["id"] for e in event_log.read(tmp_path)] == ["a.png"]


def out_of(windows, position):
    for first, end in windows:
        if first <= position < end:
            position = end
    return position


@pytest.mark.parametrize("start", [0, 3])
def test_windows_that_are_left_out(start):
    """Against walking from batch to batch."""
    rng = np.random.default_rng(start)
    for _ in range(300):
        size = int(rng.integers(1, 6))
        edges = np.unique(rng.integers(0, 40, 2 * int(rng.integers(0, 3))))
        windows = [tuple(w) for w in edges[: len(edges) // 2 * 2].reshape(-1, 2).tolist()]

        position = out_of(windows, start)
        for batches in range(12):
            assert position_after(start, batches, size, windows) == position
            position = out_of(windows, position + size)


def test_a_training_on_five_percent_of_them_ends_the_same_twice(tmp_path):
    """The whole program: listed once each, gone around, and the same state both times."""
    from imagegpt_jax import config as config_lib
    from imagegpt_jax.tasks import tokenizer
    from imagegpt_jax.training import loop

    folder = write_folder(tmp_path / "data", good=19 * len(files()))
    configs = pathlib.Path(__file__).resolve().parents[2] / "configs"
    config = config_lib.sibling(str(configs / "x.py"), "tokenizer.py").get_config("size=test")
    config.data.train = config.data.validation = f"folder:{folder}"
    config.data.train_ops = config.data.eval_ops = "decode|resize(16)|value_range(-1,1)"
    config.steps, config.eval_every, config.loss.gan_start = 45, 45, -1
    ends = []
    for name in ("first", "second"):
        state = loop.run(tokenizer.TASK, config, tmp_path / name)
        listed = [json.loads(line) for line in (tmp_path / name / "quarantine.jsonl").read_text().splitlines()]
        assert sorted(line["id"] for line in listed) == sorted(files())
        ends.append((jax.device_get(state), sorted((line["id"], line["reason"]) for line in listed)))
    jax.tree.map(np.testing.assert_array_equal, ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == (tmp_path / "second" / "metrics.jsonl").read_bytes()
