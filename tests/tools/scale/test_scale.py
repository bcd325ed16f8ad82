import pytest

from imagegpt_jax.errors import UserError

NOW, BEFORE = {"jax": "2"}, {"jax": "1"}


@pytest.fixture
def scale(load_tool):
    return load_tool("scale/scale.py")


def test_without_a_pattern_cells_that_are_not_kept_at_these_versions_are_compiled(scale):
    names = list(scale.cells())
    reports = {name: {"versions": NOW} for name in names[2:]} | {names[0]: {"versions": BEFORE}}
    assert scale.choose("", reports, NOW) == names[:2]


@pytest.mark.parametrize("versions", [NOW, BEFORE])
def test_a_pattern_decides_whatever_the_versions_are(scale, versions):
    reports = {name: {"versions": versions} for name in scale.cells()}
    names = scale.choose("20B v5p-*", reports, NOW)
    assert names == ["20B v5p-128", "20B v5p-512"]


def test_a_pattern_that_matches_nothing_is_told_so(scale):
    with pytest.raises(UserError, match=r"no cell is named 'nosuch\*'.*20B v5p-512"):
        scale.choose("nosuch*", {}, NOW)
    with pytest.raises(UserError, match="Did you mean '20B v5p-512'"):
        scale.choose("20B v5p-511", {}, NOW)
