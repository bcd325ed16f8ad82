"""The pages of evaluations, as a real browser shows them, and votes of people on a page."""

import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.evaluation import human, report
from imagegpt_jax.evaluation.html import Report, curves, histogram
from imagegpt_jax.images import Tile
from imagegpt_jax.metrics import protocols, sets

ROOT = pathlib.Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("browser", ROOT / "tests" / "browser.py")
browser_tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser_tool)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_tool.launched(tmp_path_factory.mktemp("profile")) as launched:
        yield launched


def folder(path, count, colour, side=24):
    path.mkdir(parents=True)
    for i in range(count):
        image = np.full((side, side, 3), colour, np.uint8)
        image[: i + 2, :, 0] = 255
        Image.fromarray(image).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"stripe of {i + 2} <rows> & no more")
    return sets.open_images(path)


def scores(cfg, fid, protocol="torch_fidelity"):
    result = {"value": fid, "n": 9, "interval": [fid - 1, fid + 1], "interval_of": "bootstrap of 5, 95%"}
    about = {
        "protocol": {"name": protocol},
        "sampler": {"cfg_scale": cfg},
        "warnings": [{"name": "few_samples", "text": "only <9> images"}],
    }
    return {"fid": result, "provenance": about}


def test_a_report_in_a_browser(browser, tmp_path):
    images, training = folder(tmp_path / "a", 5, 40), folder(tmp_path / "t", 9, 41)
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": i, "loss": 3 - 0.1 * i, "rate": 1.0} for i in range(10)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Report("Scores of <a>")
    report.scores_of(page, scores(3.0, 9.0))
    report.samples(page, images, [f"caption {i}" for i in range(5)])
    report.neighbours(page, images, training)
    report.worst(page, images, images, "psnr", np.array([20.0, 10.0, 30.0, 15.0, 25.0]))
    report.codes(page, np.array([5, 0, 2, 9]))
    report.sweep(page, [scores(cfg, fid) for cfg, fid in ((1.5, 12.0), (6.0, 10.5), (None, 3.0), (3.0, 9.0))])
    report.losses(page, str(run))
    report.made_of(page, scores(3.0, 9.0)["provenance"])
    (tmp_path / "report.html").write_text(page.html())

    browser.open(f"file://{tmp_path / 'report.html'}")
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.title") == "Scores of <a>"
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert headings == [
        "Scores",
        "Warnings",
        "Samples",
        "Nearest training images",
        "Worst pairs",
        "Codebook use",
        "fid against guidance",
        f"loss of {run}",
        "What was measured",
    ]
    text = browser.evaluate("document.body.innerText")
    assert "few_samples only <9> images" in text
    assert "3 of 4 codes used" in text
    # Five samples, five pairs of neighbours, five worst pairs, every picture decoded.
    assert browser.evaluate("document.images.length") == 5 + 10 + 10
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 24 && i.width === 144)")
    figures = browser.evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert figures[:2] == ["caption 0", "caption 1"]
    assert figures[5].startswith("00.png and 00.png, distance ")  # of the training images the same stripe is nearest
    assert figures[10] == "01.png: psnr 10"
    assert browser.evaluate("document.querySelectorAll('svg').length") == 3
    # The curve of three points falls and rises: a smaller y is further up.
    points = browser.evaluate("document.querySelectorAll('polyline')[0].getAttribute('points')")
    x, y = np.array([list(map(float, p.split(","))) for p in points.split()]).T
    assert (np.diff(x) > 0).all()
    assert y[1] > y[2] > y[0]
    assert browser.evaluate("document.querySelectorAll('rect').length") == 4
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    assert shot.std() > 5


def test_curves_of_nothing_and_of_one_value():
    assert "nothing to draw" in curves({"a": ([], [])}, "x", "y")
    assert "nothing to draw" in curves({"a": ([1.0], [float("nan")])}, "x", "y")
    assert "<circle" in curves({"a": ([1.0], [0.0])}, "x", "y")
    assert histogram(np.zeros(1000, int), "x", "y").count("<rect") == 320


def test_sweeps_of_two_protocols_or_without_guidance(tmp_path):
    protocol = protocols.find("torch_fidelity")
    for name, cfg, of in (("a", 2.0, "torch_fidelity"), ("b", 1.0, "clean_fid"), ("c", None, "torch_fidelity")):
        scored = scores(cfg, 2.0)
        scored["provenance"]["protocol"] = protocols.find(of).facts()
        (tmp_path / f"{name}.json").write_text(json.dumps(scored))
    assert report.guided(str(tmp_path / "a.json"), protocol)["fid"]["value"] == 2.0
    for other, words in (("b", "another protocol"), ("c", "does not say at which cfg_scale")):
        with pytest.raises(UserError, match=words):
            report.guided(str(tmp_path / f"{other}.json"), protocol)


def test_page_escapes_what_it_is_given():
    page = Report("<script>alert(1)</script>")
    page.gallery("x", [Tile('"><img src=x>', [np.zeros((4, 4, 3), np.uint8)])])
    assert "<script>" not in page.html()
    assert "<img src=x>" not in page.html()


# -------------------------------------------------------------------------------------------------------------- people


@pytest.fixture
def study(tmp_path):
    def make(count=3):
        if not (tmp_path / "a").exists():
            folder(tmp_path / "a", count, 40)
            folder(tmp_path / "b", count, 200)
        given = (sets.open_images(tmp_path / name) for name in ("a", "b"))
        return human.Study(*given, tmp_path / "votes.jsonl")

    return make


@pytest.fixture
def serve():
    servers = []

    def start(study):
        server = human.serve(study, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


BRIGHTNESS = """(() => { const c = document.createElement('canvas'); c.width = c.height = 1;
    const d = c.getContext('2d'); d.drawImage(document.getElementById('SIDE'), 0, 23, 1, 1, 0, 0, 1, 1);
    return d.getImageData(0, 0, 1, 1).data[1]; })()"""


def test_people_vote_in_a_browser_and_come_back(browser, study, serve, tmp_path):
    """The rater prefers the brighter picture, which is always B's, wherever it stands."""
    address = serve(study())
    sides = []
    for visit, pairs in ((1, [0, 1]), (2, [2])):  # the second visit is to another server of the same votes
        if visit == 2:
            address = serve(study())
        browser.open(f"{address}/?rater=ann")
        for pair in pairs:
            browser.wait(f"document.body.dataset.state === 'pair-{pair}'")
            assert browser.evaluate("document.getElementById('prompt').textContent").startswith(f"stripe of {pair + 2}")
            bright = {side: browser.evaluate(BRIGHTNESS.replace("SIDE", side)) for side in ("left", "right")}
            assert sorted(bright.values()) == [40, 200]
            better = max(bright, key=bright.get)
            sides.append(better)
            browser.evaluate(f"document.getElementById('{better}-5').click()")
            browser.evaluate(f"document.getElementById('vote-{better}').click()")
            browser.wait(f"!['pair-{pair}', 'sending'].includes(document.body.dataset.state)")
    assert browser.evaluate("document.body.dataset.state") == "finished"
    assert browser.errors == []
    shown = json.loads(browser.evaluate("document.getElementById('results').textContent"))
    votes = human.read_votes(tmp_path / "votes.jsonl")
    assert [(vote.pair, vote.choice, vote.ratings) for vote in votes] == [(i, "B", {"B": 5}) for i in range(3)]
    assert [("left" if vote.left == "B" else "right") for vote in votes] == sides
    assert shown["wins"] == {"A": 0, "B": 3, "tie": 0}
    low, high = shown["win_rate_A"]["interval"]
    assert (shown["win_rate_A"]["value"], low) == (0, pytest.approx(0))
    assert 0 < high < 0.6
    assert shown["rating_B"]["value"] == 5


def test_sides_are_random_but_fixed():
    drawn = [human.order("ann", pair, 0) for pair in range(200)]
    assert drawn == [human.order("ann", pair, 0) for pair in range(200)]
    assert 70 < sum(order == ("A", "B") for order in drawn) < 130
    assert drawn != [human.order("bob", pair, 0) for pair in range(200)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choice": "both"}, "left, right or tie"),
        ({"pair": 3}, "no such pair"),
        ({"pair": True}, "no such pair"),
        ({"ratings": {"left": 6}}, "1 to 5"),
        ({"rater": "<b>"}, "letters and digits"),
        ({"pair": 0}, "has been voted on"),
    ],
)
def test_votes_that_are_none(study, serve, tmp_path, change, words):
    address = serve(study())
    vote = {"rater": "ann", "pair": 0, "choice": "tie", "ratings": {}}

    def send(body, kind="application/json"):
        request = urllib.request.Request(f"{address}/vote", json.dumps(body).encode(), {"Content-Type": kind})
        return urllib.request.urlopen(request, timeout=10).read()

    assert send(vote) == b"{}"
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(vote | change)
    assert (caught.value.code, words in caught.value.read().decode()) == (400, True)
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(vote | {"pair": 1}, kind="text/plain")
    assert caught.value.code == 415
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_pictures_do_not_tell_their_run(study, serve):
    address = serve(study())
    data = urllib.request.urlopen(f"{address}/image/0/left?rater=ann", timeout=10).read()
    assert Image.open(io.BytesIO(data)).info == {}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/image/3/left", timeout=10)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/../votes.jsonl", timeout=10)


def test_votes_of_other_pictures_are_refused(study, tmp_path):
    (tmp_path / "votes.jsonl").write_text('{"pair": 0}\n')
    with pytest.raises(UserError, match=r"line 1 of .* is no vote"):
        study()
    vote = human.Vote(0, "other.png", "ann", "A", {}, "A", "2026-01-01")
    (tmp_path / "votes.jsonl").write_text(json.dumps(vars(vote)) + "\n")
    with pytest.raises(UserError, match="on other pictures"):
        study()


def test_win_rate_counts_ties_as_halves():
    votes = [human.Vote(i, "x", "ann", c, {}, "A", "") for i, c in enumerate(["A", "A", "tie", "B"])]
    summary = human.results(votes)
    assert summary["win_rate_A"]["value"] == 2.5 / 4
    low, high = summary["win_rate_A"]["interval"]
    assert 0 < low < 2.5 / 4 < high < 1
    assert human.table(human.results([])) == "no votes yet"
    assert "win_rate_A     0.625" in human.table(summary)


def test_the_binary_serves_until_it_is_stopped(tmp_path):
    for name in ("a", "b"):
        folder(tmp_path / name, 2, 90)
    command = [sys.executable, "-m", "imagegpt_jax.evaluate", "--human", "--port=0", f"--images={tmp_path / 'a'}"]
    process = subprocess.Popen(
        [*command, f"--against={tmp_path / 'b'}", f"--output={tmp_path / 'votes.jsonl'}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.match(r"(http://[\d.:]+/)", process.stdout.readline())[1]
        assert b"Which picture is better" in urllib.request.urlopen(address, timeout=10).read()
        process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, output.strip()) == (0, "no votes yet"), error
