import collections
import io
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.data.emoji import STYLES, EmojiSource, catalog, pictures, render
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem

# Update these when tools/build_emoji.py or the splits change, which changes every result on the set.
COUNTS = {
    "train": {"noto": 1581, "twemoji": 1795, "fluent": 1495},
    "validation": {"noto": 83, "twemoji": 96, "fluent": 79},
    "heldout_style": {"noto": 18, "twemoji": 19, "fluent": 19},
    "all": {"noto": 1682, "twemoji": 1910, "fluent": 1593},
}
FEW = 5


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A set of FEW pictures a style, which is drawn in a moment, and an empty cache folder."""
    monkeypatch.setenv("IMAGEGPT_JAX_CACHE", str(tmp_path / "cache"))
    whole, drawings = catalog.pictures(), catalog.drawings
    monkeypatch.setattr(catalog, "pictures", lambda: tuple(p for p in whole if p.row < FEW))
    monkeypatch.setattr(catalog, "drawings", lambda style: drawings(style)[:FEW])
    return tmp_path / "cache" / "emoji"


@pytest.fixture
def count_drawings(monkeypatch):
    calls = []
    draw = render.render

    def counted(documents):
        calls.append(len(documents))
        return draw(documents)

    monkeypatch.setattr(render, "render", counted)
    return calls


def pixels(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.mode == "RGB"
    return np.asarray(image)


# ----------------------------------------------------------------------------------------------------------- the set


@pytest.mark.parametrize("split", COUNTS)
def test_counts(split):
    source = EmojiSource(split)
    assert collections.Counter(p.style for p in source.pictures) == COUNTS[split]
    assert len(source) == sum(COUNTS[split].values())


def test_splits_divide_the_set_and_validation_shares_no_concept():
    by_split = {s: EmojiSource(s).pictures for s in ("train", "validation", "heldout_style")}
    ids = [p.id for chosen in by_split.values() for p in chosen]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {p.id for p in pictures()}
    concepts = {s: {p.concept for p in chosen} for s, chosen in by_split.items()}
    names = {s: {p.name for p in chosen} for s, chosen in by_split.items()}
    groups = {s: {catalog.split_group(p.codepoints) for p in chosen} for s, chosen in by_split.items()}
    for seen in (concepts, names, groups):
        assert not seen["validation"] & (seen["train"] | seen["heldout_style"])
    assert 0.04 < len(concepts["validation"]) / len({p.concept for p in pictures()}) < 0.06


def test_heldout_style_holds_one_style_of_concepts_in_train():
    heldout, train = EmojiSource("heldout_style").pictures, EmojiSource("train").pictures
    styles = collections.defaultdict(set)
    for p in train:
        styles[p.concept].add(p.style)
    assert all(styles[p.concept] == set(STYLES) - {p.style} for p in heldout)
    assert len({p.concept for p in heldout}) == len(heldout)


@pytest.mark.parametrize(
    ("codepoints", "group"),
    [
        ("1f469-200d-1f33e", "1f9d1-200d-1f33e"),  # woman, then person, farmer
        ("1f9d1-200d-1f33e", "1f9d1-200d-1f33e"),
        ("1f33e", "1f33e"),  # sheaf of rice
        ("1f3c3-200d-2640", "1f3c3"),  # woman running
        ("1f468-200d-1f9bd-200d-27a1", "1f9d1-200d-1f9bd"),  # man in a wheelchair facing right
        ("2640", "2640"),  # the female sign itself
    ],
)
def test_variants_share_a_split_group(codepoints, group):
    assert catalog.split_group(codepoints) == group


def test_no_picture_twice_in_a_style():
    for style in STYLES:
        drawings = catalog.drawings(style)
        assert len(set(drawings)) == len(drawings) == COUNTS["all"][style]
    assert not [p for p in pictures() if "skin-tone" in p.slug or any(f"1f3f{x}" in p.codepoints for x in "bcdef")]


def test_styles_agree_on_names_and_categories():
    about = collections.defaultdict(set)
    for p in pictures():
        about[p.concept].add((p.name, p.codepoints, p.category, p.keywords))
    assert all(len(a) == 1 for a in about.values())
    names = [a[0] for [a] in about.values()]
    assert len(set(names)) == len(names) == 1942
    by_id = {p.id: p for p in pictures()}
    assert {by_id[f"{s}/pinata"].name for s in STYLES} == {"piñata"}
    assert by_id["fluent/pinata"].slug == "piata"
    assert by_id["twemoji/flag-bosnia-and-herzegovina"].name == "flag of Bosnia and Herzegovina"
    assert {catalog.categories()[p.category] for p in pictures()} == set(catalog.categories())
    assert catalog.categories()[by_id["fluent/crab"].category] == "Animals & Nature"  # its own set calls it food


# -------------------------------------------------------------------------------------------------------- the source


def test_records(few):
    source = EmojiSource("all", res=20)
    records = source.__getitems__([4, 0])
    assert [r["id"] for r in records] == [source.pictures[4].id, source.pictures[0].id]
    medal = source.__getitems__([0])[0]
    image = medal.pop("image")
    assert medal == {
        "id": "noto/1st-place-medal",
        "captions": ["noto emoji of 1st place medal"],
        "label": source.label_names.index("Activities"),
        "concept": "1st-place-medal",
        "style": "noto",
    }
    assert pixels(image).shape == (20, 20, 3)
    assert pixels(image).std() > 20


def test_keywords_are_a_second_caption(few):
    [record] = EmojiSource("all", captions="keywords").__getitems__([0])
    name, keywords = record["captions"]
    assert name == "noto emoji of 1st place medal"
    assert keywords.startswith("noto emoji of ")
    assert "gold" in keywords


def test_styles_and_names():
    two = EmojiSource("train", res=16, styles=("fluent", "noto"))
    assert two.name == "emoji:train,res=16,styles=noto+fluent"
    assert {p.style for p in two.pictures} == {"noto", "fluent"}
    assert two.fingerprint == EmojiSource("train", res=16, styles=("noto", "fluent")).fingerprint
    assert EmojiSource("train").name == "emoji:train,res=32"


def test_fingerprints_tell_contents_apart():
    sources = [
        EmojiSource("train"),
        EmojiSource("validation"),
        EmojiSource("train", res=33),
        EmojiSource("train", styles="noto"),
        EmojiSource("train", captions="keywords"),
    ]
    assert len({s.fingerprint for s in sources}) == len(sources)
    assert EmojiSource("train").fingerprint == sources[0].fingerprint


def test_pairs_are_the_same_thing_in_other_styles():
    source = EmojiSource("validation")
    pairs = source.pairs()
    per_concept = collections.Counter(p.concept for p in source.pictures)
    assert len(pairs) == len(set(pairs)) == sum(n * (n - 1) for n in per_concept.values())
    for i, j in pairs:
        assert source.pictures[i].concept == source.pictures[j].concept
        assert source.pictures[i].style != source.pictures[j].style
    assert EmojiSource("heldout_style").pairs() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "no split 'trian'. Did you mean 'train'?"),
        ({"styles": ("noto", "twemojy")}, "Did you mean 'twemoji'?"),
        ({"styles": ()}, "name some of noto, twemoji, fluent"),
        ({"captions": "names"}, "Did you mean 'name'?"),
        ({"res": 0}, "choose 1 to 2048"),
        ({"res": 4096}, "choose 1 to 2048"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as e:
        EmojiSource(**arguments)
    assert message in str(e.value)


def test_importing_is_light():
    code = "import sys, imagegpt_jax.data.emoji; print({'jax', 'tensorflow', 'resvg_py', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --------------------------------------------------------------------------------------------------------- rendering


def test_pictures_are_fitted_on_white():
    [melon] = [p for p in pictures() if p.id == "twemoji/watermelon"]
    assert melon.width > melon.height
    document = render.svg_document(melon, '<rect width="100%" height="100%" fill="#f00"/>', 36)
    [image] = [pixels(png) for png in render.render([document])]
    red = (image == (255, 0, 0)).all(axis=-1)
    white = (image == 255).all(axis=-1)
    rows = np.flatnonzero(red.all(axis=1))
    assert len(rows) == 24  # of a height of 25.22; the rows at its edges are blends
    assert abs(rows[0] - (35 - rows[-1])) <= 1  # centred
    assert white[: rows[0] - 1].all()
    assert white[rows[-1] + 2 :].all()


def test_renders_in_order_and_says_when_a_process_fails():
    colors = [f"#0000{i:02x}" for i in range(0, 250, 10)]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="2" height="2"><rect width="2" height="2" fill="{}"/></svg>'
    values = [pixels(png)[0, 0, 2] for png in render.render([svg.format(c) for c in colors])]
    assert values == list(range(0, 250, 10))
    with pytest.raises(RuntimeError, match="ended early"):
        list(render.render([svg.format("red"), "<svg", svg.format("red")]))


def test_draws_once_per_style_and_resolution(few, count_drawings):
    first = EmojiSource("all", res=8).__getitems__(range(3 * FEW))
    assert count_drawings == [FEW] * 3
    assert EmojiSource("all", res=8).__getitems__(range(3 * FEW)) == first
    assert count_drawings == [FEW] * 3
    EmojiSource("all", res=9, styles="noto").__getitems__([0])
    assert count_drawings == [FEW] * 4
    assert sorted(f.suffix for f in few.iterdir()) == [".zip"] * 4
    with zipfile.ZipFile(next(few.glob("noto-8px*"))) as archive:
        assert archive.namelist()[0] == "1st-place-medal.png"
        assert archive.read("1st-place-medal.png") == first[0]["image"]


def test_the_cache_of_another_renderer_is_not_used(few, count_drawings, monkeypatch):
    before = EmojiSource("all", styles="noto")
    before.__getitems__([0])
    monkeypatch.setattr(render, "renderer_version", lambda: "another")
    after = EmojiSource("all", styles="noto")
    after.__getitems__([0])
    assert count_drawings == [FEW] * 2
    assert len(list(few.iterdir())) == 2


def test_two_at_once(few):
    results = [None] * 4

    def read(i):
        results[i] = EmojiSource("all", res=8).__getitems__(range(3 * FEW))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results[0]) == 3 * FEW
    assert all(f == results[0] for f in results)
    assert len(list(few.iterdir())) == 3


def test_a_damaged_picture_is_noticed_and_a_cut_off_cache_is_made_again(few, count_drawings):
    good = EmojiSource("all", res=8, styles="noto").__getitems__(range(FEW))
    [path] = few.iterdir()
    data = path.read_bytes()
    at = data.index(good[2]["image"]) + 40
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    source = EmojiSource("all", res=8, styles="noto")
    assert source.__getitems__([0, 1, 3]) == [good[0], good[1], good[3]]
    with pytest.raises(UserError, match="is damaged: delete it"):
        source.__getitems__([2])
    assert count_drawings == [FEW]
    for cut in (data[: len(data) // 2], b""):
        path.unlink()  # a new file: the old one is mapped
        path.write_bytes(cut)
        assert EmojiSource("all", res=8, styles="noto").__getitems__(range(FEW)) == good
    assert count_drawings == [FEW] * 3


def test_a_failure_leaves_nothing_behind(few, monkeypatch):
    monkeypatch.setattr(catalog, "drawings", lambda style: ["<g/>", "<g/>", "<g", "<g/>", "<g/>"])
    with pytest.raises(RuntimeError):
        EmojiSource("all", res=8).__getitems__([0])
    assert list(few.iterdir()) == []


def test_a_cache_that_cannot_be_written(few, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMAGEGPT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set IMAGEGPT_JAX_CACHE to a folder"):
        EmojiSource("all").__getitems__([0])


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("IMAGEGPT_JAX_CACHE", raising=False)
    assert str(filesystem.cache_dir()) == "/home/somebody/.cache/imagegpt_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(filesystem.cache_dir()) == "/x/imagegpt_jax"
    monkeypatch.setenv("IMAGEGPT_JAX_CACHE", "~/mine")
    assert str(filesystem.cache_dir()) == "/home/somebody/mine"
