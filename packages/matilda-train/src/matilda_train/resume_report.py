"""The outcome of a proof of resumption, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from matilda_train.phases import PHASES

if TYPE_CHECKING:
    from matilda_train.verify_resume import ResumeReport

__all__ = ["as_json", "describe"]

MOST_DIFFERENCES = 20
ENVIRONMENT = ("device", "cuda", "python", "packages", "git_sha", "git_diff_sha256")


def describe(report: ResumeReport) -> str:
    """A table of the lives ended by phase and signal, and what was found, in lines."""
    names = sorted({name for name, _ in report.kills})
    environment = report.environment
    packages = environment.get("packages", {})
    lines = []
    if environment:
        lines.append(f"on {environment.get('device')}, torch {packages.get('torch')}")
    lines.append(f"{'while':16}" + "".join(f"{name:>9}" for name in names))
    for phase in ("importing", *PHASES):
        counts = [report.kills[name, phase] for name in names]
        if any(counts):
            lines.append(f"{phase:16}" + "".join(f"{count:9,}" for count in counts))
    totals = [sum(n for (s, _), n in report.kills.items() if s == name) for name in names]
    lines.append(f"{'in all':16}" + "".join(f"{total:9,}" for total in totals))
    compared = "bit for bit" if report.bitwise else "by losses"
    lines.append(
        f"{report.n_kills:,} lives ended; {report.runs:,} runs compared {compared} with the twin; "
        f"{report.resume_points:,} resume points compared bit for bit in memory"
    )
    if (noise := report.noise) is not None:
        lines.append("loss, nats: RMS difference from the twin of the victim / of another twin")
        for quarter, (mine, theirs) in enumerate(noise.rms, start=1):
            lines.append(f"  quarter {quarter} of the run   {mine:.2e} / {theirs:.2e}")
        lines.append("  largest at one step  {:.2e} / {:.2e}".format(*noise.largest))
        lines.append(
            f"  {noise.redone_steps} steps done again after a kill: at most "
            f"{noise.largest_redone:.2e} from the first time"
        )
    if report.goodput is not None:
        lines.append(report.goodput.table())
    if report.interruptions:
        runs = ", ".join(f"{n} times at {run}" for run, n in report.interruptions.items())
        idle = f"; the {report.idle_seconds:,.0f} s until then are not accounted for"
        lines.append(
            f"the proof was interrupted {runs}, and went on{idle if report.goodput else ''}"
        )
    lines.append(f"{len(report.differences)} differences")
    lines += [f"  {difference}" for difference in report.differences[:MOST_DIFFERENCES]]
    if not report.complete:
        lines.append("Not done yet: run the same command again to go on.")
    return "\n".join(lines)


def as_json(report: ResumeReport) -> dict[str, Any]:
    """Everything in `report`, with lives ended by phase and then signal."""
    kills: dict[str, dict[str, int]] = {}
    for (name, phase), count in sorted(report.kills.items()):
        kills.setdefault(phase, {})[name] = count
    return {
        "complete": report.complete,
        "bitwise": report.bitwise,
        "lives_ended": report.n_kills,
        "by_phase": kills,
        "runs_compared": report.runs,
        "resume_points_compared": report.resume_points,
        "differences": report.differences,
        "noise": asdict(report.noise) if report.noise else None,
        "goodput": report.goodput.fraction if report.goodput else None,
        "wall_seconds": report.goodput.wall_seconds if report.goodput else None,
        "restarts": report.goodput.restarts if report.goodput else None,
        "seconds": report.goodput.seconds if report.goodput else None,
        "interruptions": dict(report.interruptions),
        "idle_seconds": report.idle_seconds,
        "environment": {k: report.environment.get(k) for k in ENVIRONMENT},
    }
