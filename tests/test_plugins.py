import json

import pytest

from imagegpt_jax import plugins
from imagegpt_jax.errors import UserError

TABLE = {"hinge": 1, "logistic": 2}


def test_a_name_is_ours_or_a_users(tmp_path, monkeypatch):
    (tmp_path / "of_a_user.py").write_text("import math\nPI = math.pi\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.resolve("hinge", "loss", TABLE) == 1
    assert plugins.resolve("json:loads", "loss", TABLE) is json.loads
    assert plugins.resolve("of_a_user:PI", "loss", TABLE) > 3
    assert plugins.find_module("json.decoder", "task") == "json.decoder"
    for message, call in {
        r"unknown loss 'hingee'. Did you mean 'hinge'\?": lambda: plugins.resolve("hingee", "loss", TABLE),
        "Your own is given as module:name": lambda: plugins.resolve("json:", "loss", TABLE),
        "unknown loss ':loads'": lambda: plugins.resolve(":loads", "loss", TABLE),
        "loss=json:no_such cannot be imported .*no_such": lambda: plugins.resolve("json:no_such", "loss", TABLE),
        "loss=no_such_module:f cannot be imported": lambda: plugins.plug_in("no_such_module:f", "loss"),
        r"unknown task 'decodr'. Did you mean 'decoder'\?": lambda: plugins.find_module("decodr", "task", ["decoder"]),
        "task=no.such is no module .* folder that holds no": lambda: plugins.find_module("no.such", "task"),
        r"task=\.x is no module": lambda: plugins.find_module(".x", "task"),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
