"""Progress bars move on a terminal, and are lines in a log."""

import io
import sys

import pytest

from imagegpt_jax.runtime import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_only_a_terminal_is_sent_carriage_returns(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal))
    assert list(progress.bar(range(3), desc="encode", unit="image")) == [0, 1, 2]
    assert ("\r" in stream.getvalue()) == terminal
    if not terminal:
        first, *_, last = stream.getvalue().splitlines()
        assert first.startswith("encode:   0%")
        assert "3/3" in last


def test_the_line_of_a_step(capsys):
    progress.print_step("decoder", 40, 330, {"loss": "4.26", "psnr": "20"}, 2.9)
    assert capsys.readouterr().err == "decoder: step 40/330, loss 4.26, psnr 20, 2.9 steps/s, 01:40 left\n"
