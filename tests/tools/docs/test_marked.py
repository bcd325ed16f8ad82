import pytest

from imagegpt_jax.errors import UserError


def test_a_page_is_filled_between_its_marks(tmp_path, load_tool):
    marked = load_tool("docs/marked.py")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- rows -->\nold\n<!-- /rows -->\nb\n<!-- more -->\n<!-- /more -->\n")
    for _ in range(2):
        marked.fill(page, rows=r"| \1 new |", more="x")
        expected = "a\n<!-- rows -->\n| \\1 new |\n<!-- /rows -->\nb\n<!-- more -->\nx\n<!-- /more -->\n"
        assert page.read_text() == expected
    page.write_text("<!-- rows -->\n<!-- /rows -->\nnothing")
    with pytest.raises(UserError, match="<!-- more -->"):
        marked.fill(page, rows="new", more="")
    assert "new" not in page.read_text()
