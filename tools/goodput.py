"""Where the time of a training run went, by its `events.jsonl`: steps, compiling, waiting, saving, and lost work.

  python tools/goodput.py --workdir=runs/decoder
  python tools/goodput.py --workdir=runs/tokenizer --workdir=runs/decoder --output=goodput.json

Goodput is the share of the wall time, from the first start to the last event, that was spent in steps which count. What
saving costs is the time that it held the steps up; writing goes on in the background.
"""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors
from imagegpt_jax.runtime import event_log

WORKDIR = flags.DEFINE_multi_string("workdir", None, "Folder of a training run; may be given often.", required=True)
OUTPUT = flags.DEFINE_string("output", "", "File to write the numbers into, as JSON.")

# In the order of the table.
KINDS = ("steps", "compile", "data wait", "evaluation", "save", "restore", "lost work", "start-up", "down")


def shares(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each kind in `KINDS`; they add up to the time from the first event to the last.

    Args:
      events: of the run, in order.
    """
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    runs: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            runs.append([])
        if runs:
            runs[-1].append(event)
    for i, run in enumerate(runs):
        length = run[-1]["time"] - run[0]["time"]
        told = _told(run, runs[i + 1] if i + 1 < len(runs) else [])
        for kind, value in told.items():
            seconds[kind] += value
        seconds["start-up"] += max(0.0, length - sum(told.values()))
        if i + 1 < len(runs):
            seconds["down"] += runs[i + 1][0]["time"] - run[-1]["time"]
    return seconds


def _told(run: Sequence[dict[str, Any]], following: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the events of one run say of their own time."""
    told: dict[str, float] = dict.fromkeys(
        ("steps", "compile", "data wait", "evaluation", "save", "restore", "lost work"), 0.0
    )
    # Later than this step nothing counts: the next start went back to it.
    kept = next((e["step"] for e in following if e["event"] == "restore"), 0 if following else None)
    for number, event in enumerate(run):
        kind = event["event"]
        if kind == "compile":
            told["compile"] += event["seconds"]
        elif kind == "restore":
            told["restore"] += event["seconds"]
        elif kind == "verify":  # of the last checkpoint
            told["save"] += event["seconds"]
        elif kind == "steps":
            waits = {
                "data wait": event["data_wait_seconds"],
                "evaluation": event["evaluation_seconds"],
                "save": event["checkpoint_seconds"],
            }
            for name, value in waits.items():
                told[name] += value
            compiled = sum(e["seconds"] for e in run[_last_steps(run, number) : number] if e["event"] == "compile")
            own = max(0.0, event["seconds"] - sum(waits.values()) - compiled)
            back = next((e["to"] for e in run[number:] if e["event"] == "rollback"), kept)
            told["lost work" if back is not None and event["step"] > back else "steps"] += own
    return told


def _last_steps(run: Sequence[dict[str, Any]], number: int) -> int:
    return next((i for i in range(number - 1, -1, -1) if run[i]["event"] == "steps"), 0)


def saving(events: Sequence[dict[str, Any]], step_seconds: float) -> dict[str, float]:
    """What saving costs: `saves`, `megabytes` and `blocking_seconds` of one (medians), `seconds_between`, `share`.

    Args:
      events: of the run.
      step_seconds: time spent in steps; `share` is the blocking time of all saves against it.
    """
    saves = [e for e in events if e["event"] == "save"]
    if not saves:
        return {"saves": 0}
    return {
        "saves": len(saves),
        "megabytes": statistics.median(e["bytes"] for e in saves) / 1e6,
        "blocking_seconds": statistics.median(e["blocking_seconds"] for e in saves),
        "seconds_between": step_seconds / len(saves),
        "share": sum(e["blocking_seconds"] for e in saves) / max(step_seconds, 1e-9),
    }


def report(workdir: str) -> dict[str, Any]:
    """Prints the table of a run; returns its numbers.

    Raises:
      UserError: if the folder holds none.
    """
    events = event_log.read(workdir)
    if not any(e["event"] == "start" for e in events):
        raise errors.UserError(f"{workdir} holds no {event_log.NAME} of a training run: give its --workdir.")
    seconds = shares(events)
    total = sum(seconds.values())
    counts = {
        kind: sum(e["event"] == kind for e in events) for kind in ("start", "save", "skip", "rollback", "damaged")
    }
    print(f"{workdir}:")
    for kind, value in seconds.items():
        print(f"{kind:<12} {value:>10.1f} s  {value / max(total, 1e-9):>6.1%}")
    print(f"{'goodput':<12} {'':>10}    {seconds['steps'] / max(total, 1e-9):>6.1%}")
    print(", ".join(f"{count} x {kind}" for kind, count in counts.items() if count))
    cost = saving(events, seconds["steps"] + seconds["lost work"])
    if cost["saves"]:
        print(
            f"a save of {cost['megabytes']:.0f} MB held the steps up for {cost['blocking_seconds']:.3f} s, every"
            f" {cost['seconds_between']:.0f} s of steps: {cost['share']:.2%} of their time"
        )
    return {"seconds": seconds, "total": total, "events": counts, "saving": cost}


def main() -> None:
    """Prints the tables."""
    numbers = {workdir: report(workdir) for workdir in WORKDIR.value}
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
