"""The table of `time_to_loss.py`: who met nanoGPT's lowest last loss, and when."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

REFERENCE = "nanogpt"

Curve = list[dict[str, float]]


def seconds_to(curve: Curve, target: float) -> float | None:
    """Seconds at which a curve first meets a loss, between points by the logarithm of the time."""
    before: dict[str, float] | None = None
    for now in curve:
        if now["val_loss_nats"] <= target:
            if before is None or before["seconds"] <= 0:
                return now["seconds"]
            share = (before["val_loss_nats"] - target) / (
                before["val_loss_nats"] - now["val_loss_nats"]
            )
            return float(before["seconds"] * (now["seconds"] / before["seconds"]) ** share)
        before = now
    return None


def describe(results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, with the target: the lowest last loss of nanoGPT's longest runs."""
    references = [r for r in results if is_reference(r)]
    if not references:
        return "No run of nanoGPT yet, whose loss is the target.\n" + "\n".join(
            f"{r['system']}, {r['minutes']:g} min: {r['curve'][-1]['val_loss_nats']:.4f} nats"
            for r in results
        )
    longest = max(float(r["minutes"]) for r in references)
    reference = min(
        (r for r in references if r["minutes"] == longest),
        key=lambda r: float(r["curve"][-1]["val_loss_nats"]),
    )
    last = reference["curve"][-1]
    target, minutes = last["val_loss_nats"], last["seconds"] / 60
    lines = [
        f"Target: the held-out loss that nanoGPT ({reference['system']}) has after {minutes:.2f} "
        f"minutes of training, {target:.4f} nats a token, T={reference['seq_len']}.",
        "",
        "| system, minutes | parameters | tokens/s | tokens | last loss | minutes to the target | "
        "of nanoGPT's | with its start |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in sorted(results, key=lambda r: (not is_reference(r), r["system"], -r["minutes"])):
        lines.append(_row(result, reference, target))
    environments = {json.dumps(r["environment"], sort_keys=True) for r in results}
    lines += ["", *_notes(results, environments)]
    return "\n".join(lines)


def is_reference(result: dict[str, Any]) -> bool:
    """Whether it is nanoGPT's, with its own batch or another."""
    return str(result["system"]).partition("@")[0] == REFERENCE


def on_other_windows(results: Sequence[dict[str, Any]]) -> list[str]:
    """`measured on`, `trained on`: what not all of the results were on the same windows."""
    known = [result["windows"] for result in results if "windows" in result]
    verbs = {"held_out": "measured on", "training": "trained on"}
    return [verb for split, verb in verbs.items() if len({w[split] for w in known}) > 1]


def _row(result: dict[str, Any], reference: dict[str, Any], target: float) -> str:
    last = result["curve"][-1]
    met = seconds_to(result["curve"], target)
    cells = ["–"] * 3
    if met is not None:
        whole = reference["curve"][-1]["seconds"]
        started = (met + result["start_seconds"]) / (whole + reference["start_seconds"])
        cells = [f"{met / 60:.2f}", f"{100 * met / whole:.0f} %", f"{100 * started:.0f} %"]
    return (
        f"| {result['system']}, {result['minutes']:g} | {result['n_params'] / 1e6:.1f}M | "
        f"{last['tokens'] / max(last['seconds'], 1e-9):,.0f} | {last['tokens'] / 1e6:,.1f}M | "
        f"{last['val_loss_nats']:.4f} | {' | '.join(cells)} |"
    )


def beside(result: dict[str, Any]) -> str:
    at_once = result.get("systems_at_once", 1)
    return f", at most {at_once - 1} other(s) on another GPU of the host" if at_once > 1 else ""


def _notes(results: Sequence[dict[str, Any]], environments: set[str]) -> Iterator[str]:
    yield (
        "The clock stands still while a system is evaluated, every system on the same held-out "
        "windows. nanoGPT's own batch is for hundreds of thousands of steps: the lowest of its "
        "runs of that length is the target; `@` gives the tokens of another batch, `x` a factor "
        "on its rate. A system's start (loading, compiling, the first step, cold) is counted in "
        "the last column alone. A run's learning rate falls to its end, so a loss is met late in "
        "it: shorter runs show how little time is enough. One run each: no noise is measured."
    )
    for result in results:
        commit = f", commit {result['commit'][:12]}" if result.get("commit") else ""
        yield (
            f"- {result['system']}, {result['minutes']:g} min: {result['recipe']}; "
            f"{result['tokens_per_step']:,} tokens a step, {result['steps']:,} steps, start "
            f"{result['start_seconds']:.0f} s{commit}{beside(result)}. `{result['command']}`"
        )
    if len({json.loads(text)["device"] for text in environments}) > 1:
        yield "- NOT COMPARABLE: these runs are from several kinds of devices."
    for how in on_other_windows(results):
        yield f"- NOT COMPARABLE: these runs were not all {how} the same windows."
    boards = {result["board"] for result in results if result.get("board")}
    if len(boards) > 1:
        yield f"- From {len(boards)} boards, of which one may be some percent faster than another."
    for text in sorted(environments):
        found = json.loads(text)
        kernels = "".join(f", {name} {has}" for name, has in found.get("kernels", {}).items())
        yield (
            f"- {found['device']}, torch {found['torch']}{kernels}, CUDA {found['cuda']}, Python "
            f"{found['python']}, our commit {(found['git_sha'] or 'unknown')[:12]}; data set "
            f"{', '.join(sorted({r['data_id'][:12] for r in results}))}."
        )
