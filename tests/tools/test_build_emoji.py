import dataclasses
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from imagegpt_jax.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "build_emoji.py"


@pytest.fixture
def tool(load_tool):
    return load_tool("build_emoji.py")


def icon_set(*icons, size=32):
    """icons.json, metadata.json and chars.json of (slug, codepoints, body, category, more) tuples."""
    names = [i[0] for i in icons]
    categories = {c: [i[0] for i in icons if i[3] == c] for c in {i[3] for i in icons}}
    return [
        {"icons": {i[0]: {"body": i[2], **i[4]} for i in icons}, "width": size, "height": size},
        {"categories": categories},
        {i[1]: n for i, n in zip(icons, names, strict=True)},
    ]


def sets():
    faces, food, flags = "Smileys & Emotion", "Food & Drink", "Flags"
    noto = icon_set(
        ("red-heart", "2764-fe0f", "<a/>", faces, {}),
        ("wave-dark", "1f44b-1f3ff", "<b/>", faces, {}),
        ("heart", "2764", "<c/>", faces, {"hidden": True}),
        ("newcomer", "1fac0", "<new/>", faces, {}),
    )
    twemoji = icon_set(
        ("heart-red", "2764", "<d/>", faces, {}),
        ("flag-chad", "1f1f9-1f1e9", "<e/>", flags, {}),
        ("flag-long-name", "1f1f7-1f1f4", "<e/>", flags, {}),
        size=36,
    )
    fluent = icon_set(("piata", "1fa85", "<f/>", food, {"height": 33}), ("heart", "2764-fe0f", "<g/>", food, {}))
    return {"noto": noto, "twemoji": twemoji, "fluent": fluent}


EMOJIBASE = [
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"]},
    {"hexcode": "1FA85", "label": "piñata"},
    {"hexcode": "1F1F9-1F1E9", "label": "flag: Chad & Co."},
]


def test_build(tool):
    files = tool.build(sets(), EMOJIBASE)
    index = json.loads(lzma.decompress(files["index.json.xz"]))
    svg = {s: lzma.decompress(files[f"{s}.svg.xz"]).decode().split("\n") for s in ("noto", "twemoji", "fluent")}
    category = index["categories"].index
    assert index["concepts"] == [
        ["flag-chad", "flag of Chad and Co.", "1f1f9-1f1e9", category("Flags"), []],
        ["newcomer", "newcomer", "1fac0", category("Smileys & Emotion"), []],  # not in emojibase yet
        ["piata", "piñata", "1fa85", category("Food & Drink"), []],
        ["red-heart", "red heart", "2764", category("Smileys & Emotion"), ["love"]],
    ]
    rows = {style: index["pictures"][style]["rows"] for style in svg}
    # The hidden and the skin-tone icon are left out, and of equal drawings the shorter name stays.
    assert rows["noto"] == [[1, "newcomer", 32, 32], [3, "red-heart", 32, 32]]
    assert rows["twemoji"] == [[0, "flag-chad", 36, 36], [3, "heart-red", 36, 36]]
    assert rows["fluent"] == [[2, "piata", 32, 33], [3, "heart", 32, 32]]
    assert svg == {"noto": ["<new/>", "<a/>"], "twemoji": ["<e/>", "<d/>"], "fluent": ["<f/>", "<g/>"]}
    assert index["pictures"]["noto"]["sha256"] == hashlib.sha256(b"<new/>\n<a/>").hexdigest()
    assert tool.build(sets(), EMOJIBASE) == files


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("keycap: #", "keycap hash"),
        ("keycap: *", "keycap asterisk"),
        ("Japanese “free of charge” button", "Japanese free of charge button"),
        ("ON! arrow", "ON arrow"),
        ("man: blond hair", "man blond hair"),
        ("woman’s hat", "woman's hat"),
    ],
)
def test_plain_name(tool, label, name):
    assert tool.plain_name(label) == name


def test_concepts_of_one_name_are_refused(tool):
    with pytest.raises(ValueError, match="red heart"):
        tool.build(sets(), [*EMOJIBASE, {"hexcode": "1FAC0", "label": "red heart"}])
    broken = sets()
    broken["noto"][0]["icons"]["newcomer"]["body"] = "<new>\n</new>"
    with pytest.raises(ValueError, match="line break"):
        tool.build(broken, EMOJIBASE)


def test_packages_must_be_the_published_ones(tool, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        info = tarfile.TarInfo("package/en/data.json")
        data = json.dumps(EMOJIBASE).encode()
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    package = tool.Package(name="@a/b", version="1.0", sha256=hashlib.sha256(out.getvalue()).hexdigest())
    path = tmp_path / package.filename
    assert path.name == "a-b-1.0.tgz"
    with pytest.raises(UserError, match=r"npm pack @a/b@1\.0"):
        tool.read_members(path, package, ("en/data.json",))
    path.write_bytes(out.getvalue())
    assert tool.read_members(path, package, ("en/data.json",)) == [EMOJIBASE]
    with pytest.raises(UserError, match="SHA-256"):
        tool.read_members(path, dataclasses.replace(package, sha256="0" * 64), ("en/data.json",))


def test_missing_packages_are_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, TOOL, f"--packages={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "npm pack @iconify-json/noto@1.2.9" in done.stderr
