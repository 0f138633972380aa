"""The outcome of a proof of resumption, for people and as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from matilda_train.kernel_noise import Noise
from matilda_train.phases import PHASES
from matilda_train.time_account import Goodput

__all__ = ["ResumeReport", "as_json", "describe"]

MOST_DIFFERENCES = 20
ENVIRONMENT = ("device", "cuda", "python", "packages", "git_sha", "git_diff_sha256")


@dataclass
class ResumeReport:
    """What was done to the victims, and how they differ from the twin: not at all, or failed."""

    bitwise: bool = True
    """Whether equal bits are expected of whole runs, not of resume points alone."""
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Lives ended by (signal, what they were doing)."""
    runs: int = 0
    """Victim runs brought to their end."""
    resume_points: int = 0
    """Restored states compared, in memory, with the state that was saved."""
    differences: list[str] = field(default_factory=list)
    """One sentence for each value that is not as it must be."""
    noise: Noise | None = None
    """Where bits do not repeat: losses against what undisturbed runs differ by."""
    goodput: Goodput | None = None
    """Where the time of the one long run went; the proof's own pauses are left out."""
    first_starts: list[float] = field(default_factory=list)
    """Seconds from the start of a process to the end of its first step, of runs that began."""
    resumes: list[float] = field(default_factory=list)
    """The same of runs that went on from a checkpoint."""
    resumes_compiled: list[bool] = field(default_factory=list)
    """Of each resume of the one long run, with `train.compile`: whether it compiled anything."""
    interruptions: Counter[str] = field(default_factory=Counter)
    """How often the proof itself was interrupted and went on, by the run that it was at."""
    idle_seconds: float = 0.0
    """How long the one long run lay still because nobody went on with the proof."""
    complete: bool = True
    """False when it paused: the same command goes on."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What the twin's `run.json` says of device, versions and code."""

    @property
    def n_kills(self) -> int:
        """Lives ended in all."""
        return sum(self.kills.values())


def describe(report: ResumeReport) -> str:
    """A table of the lives ended by phase and signal, and what was found, in lines."""
    names = sorted({name for name, _ in report.kills})
    environment = report.environment
    packages = environment.get("packages", {})
    lines = []
    if environment:
        lines.append(f"on {environment.get('device')}, torch {packages.get('torch')}")
    if names:
        lines.append(f"{'while':16}" + "".join(f"{name:>9}" for name in names))
    for phase in ("importing", *PHASES):
        counts = [report.kills[name, phase] for name in names]
        if any(counts):
            lines.append(f"{phase:16}" + "".join(f"{count:9,}" for count in counts))
    if names:
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
        lines += _describe_starts(report)
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


def _describe_starts(report: ResumeReport) -> list[str]:
    lines = []
    if report.first_starts:
        firsts = " / ".join(f"{seconds:.1f}" for seconds in report.first_starts)
        lines.append(f"from the start of a process to the end of its first step: {firsts} s")
    if resumes := sorted(report.resumes):
        lines.append(
            f"  resumed, {len(resumes)} times: median {statistics.median(resumes):.1f} s "
            f"[{resumes[0]:.1f} to {resumes[-1]:.1f}]"
        )
    if compiled := report.resumes_compiled:
        lines.append(f"  {sum(compiled)} of {len(compiled)} resumes traced or compiled anything")
    return lines


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
        "first_starts_seconds": report.first_starts,
        "resumes_seconds": report.resumes,
        "resumes_compiled": report.resumes_compiled,
        "interruptions": dict(report.interruptions),
        "idle_seconds": report.idle_seconds,
        "environment": {k: report.environment.get(k) for k in ENVIRONMENT},
    }
