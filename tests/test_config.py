import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from imagegpt_jax import config
from imagegpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    widths: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    depth: int
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_arguments_take_the_type_of_their_defaults():
    args = config.parse_arg("size=emoji,res=64,flip=true", size="test", res=32, flip=False)
    assert (args.size, args.res, args.flip) == ("emoji", 64, True)
    assert config.parse_arg(None, size="test").size == "test"


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("siz=emoji", "Did you mean 'size'"),
        ("res=big", "not a int"),
        ("size", "needs a value"),
        ("flip=2", "not a bool"),
    ],
)
def test_wrong_arguments_say_what_to_type(arg, words):
    with pytest.raises(UserError, match=words):
        config.parse_arg(arg, size="test", res=32, flip=False)


def test_unknown_choice_lists_the_choices():
    with pytest.raises(UserError, match="Did you mean 'emoji'.*test, emoji"):
        config.choose("size", "emojy", {"test": 1, "emoji": 2})


def test_dataclass_is_built_nested_and_strict():
    built = config.to_dataclass(Outer, ConfigDict({"depth": 3, "inner": {"widths": [4, 5]}}))
    assert built == Outer(depth=3, inner=Inner(widths=(4, 5)))
    with pytest.raises(UserError, match="no key 'dept'.*Did you mean 'depth'"):
        config.to_dataclass(Outer, {"dept": 3})
    with pytest.raises(UserError, match="no key 'width'.*Did you mean 'widths'"):
        config.to_dataclass(Outer, {"depth": 3, "inner": {"width": ()}})
    with pytest.raises(UserError, match="needs the keys depth"):
        config.to_dataclass(Outer, {})


def test_workdir_of_another_config_is_refused(tmp_path):
    first = ConfigDict({"steps": 3, "optim": {"lr": 0.1}, "log_every": 2, "grid": (2, 2)})
    config.check_workdir(first, tmp_path / "new")
    config.save(first, tmp_path)
    config.check_workdir(first, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optim"] == {"lr": 0.1}
    assert config.load(tmp_path).grid == (2, 2) or list(config.load(tmp_path).grid) == [2, 2]

    harmless = ConfigDict({**first.to_dict(), "log_every": 50})
    config.check_workdir(harmless, tmp_path)

    other = ConfigDict({**first.to_dict(), "optim": {"lr": 0.2}})
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 -> 0\.2"):
        config.check_workdir(other, tmp_path)


def test_folder_that_is_no_workdir_is_refused(tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(UserError, match="no workdir"):
        config.check_workdir(ConfigDict({"steps": 1}), tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        config.load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        config.load(tmp_path / "gone")
