import pytest

from imagegpt_jax.runtime import filesystem


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, shared):
    path = tmp_path / "made" / "notes.txt"
    filesystem.write_whole(str(path), "old é", shared=shared)
    with filesystem.replacing(path, shared=shared) as beside:
        beside.write_bytes(b"ne")
        assert path.read_text() == "old é"
        assert beside.parent == path.parent
    assert path.read_bytes() == b"ne"

    def breaks_off():
        with filesystem.replacing(path, shared=shared) as beside:
            beside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks_off()
    assert [p.name for p in path.parent.iterdir()] == ["notes.txt"]
    assert path.read_bytes() == b"ne"


def test_files_that_several_write_at_once_do_not_meet(tmp_path):
    with (
        filesystem.replacing(tmp_path / "a", shared=True) as one,
        filesystem.replacing(tmp_path / "a", shared=True) as other,
    ):
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"
