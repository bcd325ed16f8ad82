"""People compare two runs' pictures: a small local page for blind votes and ratings, and what the votes come to.

Which picture is on the left is drawn for each rater and pair; nothing that is sent to the page tells the runs apart.
Votes are appended to a file of JSON lines, and whoever comes back goes on where they stopped.
"""

import dataclasses
import datetime
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import captions, metric
from imagegpt_jax.metrics.sets import Folder, ImageSet

RUNS = ("A", "B")
_PAGE = pathlib.Path(__file__).with_name("human.html")
_LARGEST = 4096  # bytes of a vote
_RATINGS = range(1, 6)


@dataclasses.dataclass(frozen=True)
class Vote:
    """One answer."""

    pair: int  # its number
    name: str  # what the pair's pictures are called
    rater: str
    choice: str  # "A", "B" or "tie"
    ratings: Mapping[str, int]  # run -> 1 to 5, for those that were given
    left: str  # the run that was on the left
    time: str  # ISO 8601, UTC


def order(rater: str, pair: int, seed: int) -> tuple[str, str]:
    """The runs on the left and on the right, random but the same each time."""
    turned = hashlib.sha256(f"{seed}/{rater}/{pair}".encode()).digest()[0] & 1
    return (RUNS[1], RUNS[0]) if turned else RUNS  # type: ignore[return-value]


def read_votes(path: epath.PathLike) -> list[Vote]:
    """The votes of a file; none if it is not there; raises UserError if a line is no vote."""
    file = epath.Path(path)
    votes = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
        try:
            votes.append(Vote(**json.loads(line)))
        except (ValueError, TypeError) as e:
            raise UserError(f"line {number} of {path} is no vote ({e}): name another file by --output.") from e
    return votes


def results(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often A was preferred, a tie counting half, with Wilson's interval; and the mean ratings of both."""
    if not votes:
        return {"votes": 0}
    wins = {choice: sum(vote.choice == choice for vote in votes) for choice in (*RUNS, "tie")}
    share = (wins["A"] + wins["tie"] / 2) / len(votes)
    summary: dict[str, Any] = {
        "votes": len(votes),
        "raters": len({vote.rater for vote in votes}),
        "wins": wins,
        "win_rate_A": metric.of_share(share, len(votes)),
    }
    for run in RUNS:
        given = np.array([vote.ratings[run] for vote in votes if run in vote.ratings], float)
        if len(given):
            summary[f"rating_{run}"] = metric.of_values(given)
    return summary


class Study:
    """Two sets of pictures, and the votes on them."""

    def __init__(self, a: ImageSet, b: ImageSet, path: epath.PathLike, seed: int = 0):
        """Pairs the pictures by number; raises UserError if one has more, or the votes are on others."""
        if len(a) != len(b):
            raise UserError(
                f"{a.path} has {len(a)} images and {b.path} has {len(b)}: compare samples of the same prompts."
            )
        self._sets: dict[str, ImageSet] = dict(zip(RUNS, (a, b), strict=True))
        self._path, self._seed = epath.Path(path), seed
        self.names = list(a.names)
        self.prompts = captions.known(a) if isinstance(a, Folder) else []
        self._votes, self._lock = read_votes(path), threading.Lock()
        for vote in self._votes:
            if vote.pair >= len(self.names) or self.names[vote.pair] != vote.name:
                raise UserError(
                    f"the votes of {path} are on other pictures ({vote.name}): name another file by --output."
                )

    def next(self, rater: str) -> dict[str, Any]:
        """The first pair that this rater has not seen: "pair" (None at the end), "prompt", "done", "total"."""
        with self._lock:
            seen = {vote.pair for vote in self._votes if vote.rater == rater}
        pair = next((i for i in range(len(self.names)) if i not in seen), None)
        prompt = self.prompts[pair] if pair is not None and self.prompts else ""
        return {"pair": pair, "prompt": prompt, "done": len(seen), "total": len(self.names)}

    def picture(self, rater: str, pair: int, side: str) -> bytes:
        """A picture as PNG, without the metadata that would tell the run."""
        run = order(rater, pair, self._seed)[("left", "right").index(side)]
        out = io.BytesIO()
        Image.fromarray(self._sets[run].read(pair)).save(out, "PNG")
        return out.getvalue()

    def vote(self, given: Any) -> None:
        """Appends a vote as the page sends it, and waits until it is on disk.

        Raises:
          ValueError: if it is none.
        """
        if not isinstance(given, dict):
            raise ValueError("a vote is an object")
        rater, pair, choice = given.get("rater"), given.get("pair"), given.get("choice")
        ratings = given.get("ratings", {})
        if not isinstance(rater, str) or not re.fullmatch(r"[\w .@-]{1,64}", rater):
            raise ValueError("a rater is up to 64 letters and digits")
        if not isinstance(pair, int) or isinstance(pair, bool) or not 0 <= pair < len(self.names):
            raise ValueError("there is no such pair")
        if choice not in ("left", "right", "tie") or not isinstance(ratings, dict):
            raise ValueError("a choice is left, right or tie")
        if any(side not in ("left", "right") or value not in _RATINGS for side, value in ratings.items()):
            raise ValueError("ratings are 1 to 5")
        runs: dict[str, str] = dict(zip(("left", "right"), order(rater, pair, self._seed), strict=True))
        made = Vote(
            pair=pair,
            name=self.names[pair],
            rater=rater,
            choice=runs.get(choice, "tie"),
            ratings={runs[side]: int(value) for side, value in ratings.items()},
            left=runs["left"],
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        with self._lock:
            if any(vote.rater == rater and vote.pair == pair for vote in self._votes):
                raise ValueError("this pair has been voted on")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.fspath(self._path), "a") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._votes.append(made)

    def results(self) -> dict[str, Any]:
        """What the votes so far come to."""
        with self._lock:
            return results(self._votes)


def serve(study: Study, port: int) -> http.server.ThreadingHTTPServer:
    """A server on this machine alone, ready for `serve_forever`; port 0 is a free one; raises UserError if taken."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlparse(self.path)
            rater = urllib.parse.parse_qs(url.query).get("rater", ["anonymous"])[0]
            image = re.fullmatch(r"/image/(\d+)/(left|right)", url.path)
            if url.path == "/":
                self._send(_PAGE.read_bytes(), "text/html; charset=utf-8")
            elif url.path == "/next":
                self._send(json.dumps(study.next(rater)).encode(), "application/json")
            elif url.path == "/results":
                self._send(json.dumps(study.results()).encode(), "application/json")
            elif image and int(image[1]) < len(study.names):
                self._send(study.picture(rater, int(image[1]), image[2]), "image/png")
            else:
                self._send(b"there is no such page", "text/plain", 404)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.path != "/vote" or not 0 < length <= _LARGEST:
                self._send(b"votes go to /vote, and are small", "text/plain", 400)
                return
            # A page of another site cannot send this type without asking first.
            if self.headers.get("Content-Type") != "application/json":
                self._send(b"votes are application/json", "text/plain", 415)
                return
            try:
                study.vote(json.loads(self.rfile.read(length)))
            except (ValueError, UnicodeDecodeError) as e:
                self._send(str(e).encode(), "text/plain", 400)
            else:
                self._send(b"{}", "application/json")

        def _send(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args  # requests are not news

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as e:
        raise UserError(f"port {port} cannot be used ({e.strerror}): choose another by --port.") from e


def table(results: Mapping[str, Any]) -> str:
    """Results for a terminal."""
    if not results["votes"]:
        return "no votes yet"
    lines = [f"{results['votes']} votes of {results['raters']} raters: {results['wins']}"]
    for name in ("win_rate_A", "rating_A", "rating_B"):
        if name in results:
            ends = results[name]["interval"]
            text = f"  [{ends[0]:.3f}, {ends[1]:.3f}] {results[name]['interval_of']}" if ends else ""
            lines.append(f"  {name:<12}{results[name]['value']:>8.3f}{text}")
    return "\n".join(lines)
