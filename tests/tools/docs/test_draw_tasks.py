import pytest

from imagegpt_jax import images
from imagegpt_jax.errors import UserError


def test_every_task_has_its_picture(workdirs, tmp_path, load_tool):
    given = [f"--decoder={workdirs.decoder}", f"--output={tmp_path}"]
    load_tool("docs/draw_tasks.py", *given).main()
    tasks = {"words", "unconditional", "wide", "interpolate"}
    tasks |= {"inpaint", "outpaint", "complete", "variations", "edit", "style_transfer"}
    assert {path.stem for path in tmp_path.iterdir()} == tasks
    assert images.read_metadata((tmp_path / "edit.png").read_bytes())["task"] == "edit"
    with pytest.raises(UserError, match="Did you mean 'red-heart'"):
        load_tool("docs/draw_tasks.py", *given, "--concepts=red-hart").main()


def test_a_decoder_of_classes_draws_some_of_each(workdirs, tmp_path, load_tool):
    load_tool("docs/draw_tasks.py", f"--decoder={workdirs.classes}", f"--output={tmp_path}").main()
    (path,) = tmp_path.iterdir()
    assert path.name == "classes.png"
    assert images.read_metadata(path.read_bytes())["task"] == "classes"
