"""A run's scores beside those that Pythia had after as many tokens.

The curves are EleutherAI's own (`pythia_evals.json`, with source and commit): zero-shot accuracies
at 27 steps from 0 to 143,000 of 2,097,152 tokens each. A score *equals* the token count at which a
curve's running best first reaches it, on a straight line in the logarithm of the tokens between two
checkpoints; below step 1 and beyond the last step there is only a bound.

Intervals are 95 % of 2,000 draws: the run's items drawn anew with replacement, which for items that
are right or wrong is a binomial draw, and Pythia's whole curve of a task moved by one normal draw
times its standard errors, as all its points were measured on the same items. They reach to the last
of several checkpoints that have just the score, as the first ones of LAMBADA all have none.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matilda_train.report.tables import markdown_table, plain_table

__all__ = [
    "CLEAN",
    "Comparison",
    "Curve",
    "Standing",
    "compare_with",
    "describe_tokens",
    "pythia_curves",
]

CLEAN = "_clean"  # ends the name of a task without its contaminated items
AVERAGE = "average"
DRAWS = 2000
FOOTNOTES = (
    "Pythia: {source}, commit {commit:.12}, {license}; HellaSwag is not among its results.",
    "equals: tokens at which Pythia's running best reaches the score, log-linear between its "
    "checkpoints; in brackets 95 % of draws of items and of Pythia's errors.",
    "Pythia's SciQ is the test split: a validation file of as many questions is not the same one.",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One task of one Pythia, or an average of tasks; step 0, which has no tokens, left out."""

    tokens: Floats
    """[points], ascending."""
    acc: Floats
    """[points] fractions."""
    stderr: Floats
    """[points]."""

    def equal_tokens(self, score: float) -> float:
        """Tokens at which the running best is `score`; 0 below step 1, infinity beyond the end."""
        return float(_equal_tokens(self.tokens, self.acc[None], np.array([score]))[0])


@dataclass(frozen=True)
class Standing:
    """A score of the run beside one curve."""

    score: float
    before: tuple[float, float, float] | None
    """(tokens, acc, stderr) of the last checkpoint of at most the run's tokens."""
    after: tuple[float, float, float] | None
    """The same of the first one past them."""
    equal: float
    """Tokens; 0 is below step 1, infinity beyond the last step."""
    interval: tuple[float, float]
    """95 %, as `equal`."""


@dataclass(frozen=True)
class Comparison:
    """A run beside one Pythia, by task; `average` is the last."""

    model: str
    tokens: int
    """Training tokens of the run."""
    standings: dict[str, Standing] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; token counts that are only bounds are "below" and "beyond"."""
        return {
            task: {
                "acc": standing.score,
                "pythia_before": _point(standing.before),
                "pythia_after": _point(standing.after),
                "equal_tokens": _bound(standing.equal),
                "equal_tokens_95": [_bound(tokens) for tokens in standing.interval],
            }
            for task, standing in self.standings.items()
        }


def pythia_curves(model: str) -> dict[str, Curve]:
    """The curves of one Pythia, such as "pythia-160m", by task; `ValueError` for no such model."""
    table = _table()
    if model not in table["models"]:
        known = ", ".join(table["models"])
        raise ValueError(f"There are no results of {model!r} to compare with; choose from {known}.")
    rows = table["models"][model]
    tokens = np.array(rows["steps"], dtype=np.float64) * table["tokens_per_step"]
    curves = {}
    for task, values in rows.items():
        if task != "steps":
            acc, stderr = np.array(values, dtype=np.float64).T
            trained = tokens > 0
            curves[task] = Curve(tokens[trained], acc[trained], stderr[trained])
    return curves


def footnotes() -> list[str]:
    """What a reader of a comparison must know."""
    table = _table()
    return [note.format(**{k: v for k, v in table.items() if k != "models"}) for note in FOOTNOTES]


def compare_with(
    model: str, scores: Mapping[str, tuple[float, int]], *, tokens: int, seed: int = 0
) -> Comparison:
    """Set a run's `scores`, task to (accuracy, items), beside a Pythia's.

    Tasks that Pythia has no results of are left out; a name that ends in `_clean` is set beside the
    task's own curve. The average is over the tasks, in their clean form where there is one.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    comparison = Comparison(model, tokens)
    curves = pythia_curves(model)
    drawn: dict[str, tuple[Floats, Floats]] = {}
    for task, (acc, items) in scores.items():
        curve = curves.get(task.removesuffix(CLEAN))
        if curve is None:
            continue
        moved = curve.acc + draw.standard_normal((DRAWS, 1)) * curve.stderr
        drawn[task] = (draw.binomial(items, acc, DRAWS) / items, moved)
        comparison.standings[task] = _stand(curve, acc, tokens, *drawn[task])
    counted = [task for task in drawn if task + CLEAN not in drawn]
    if len(counted) > 1:
        members = [curves[task.removesuffix(CLEAN)] for task in counted]
        curve = Curve(
            members[0].tokens,
            np.mean([each.acc for each in members], axis=0),
            np.sqrt(np.sum([each.stderr**2 for each in members], axis=0)) / len(members),
        )
        comparison.standings[AVERAGE] = _stand(
            curve,
            float(np.mean([scores[task][0] for task in counted])),
            tokens,
            np.mean([drawn[task][0] for task in counted], axis=0),
            np.mean([drawn[task][1] for task in counted], axis=0),
        )
    return comparison


def describe_tokens(tokens: float, curve_tokens: Sequence[float] | Floats) -> str:
    """`6.3B`, or a bound at an end of the curve."""
    if tokens == 0:
        return f"< {_short(float(curve_tokens[0]))}"
    return f"> {_short(float(curve_tokens[-1]))}" if math.isinf(tokens) else _short(tokens)


def describe(comparison: Comparison, *, markdown: bool = False) -> list[str]:
    """The comparison as lines of a table, without the footnotes."""
    ends = next(iter(pythia_curves(comparison.model).values())).tokens
    standings = list(comparison.standings.items())
    if not standings:
        return [f"{comparison.model}: no results of these tasks to compare with."]
    near = [standings[0][1].before, standings[0][1].after]
    heads = ["", "this run", *(f"at {_short(point[0])}" for point in near if point), "equals"]
    rows = [heads]
    for task, standing in standings:
        cells = [
            f"{100 * p[1]:.1f} ± {100 * p[2]:.1f}" for p in (standing.before, standing.after) if p
        ]
        low, high = (describe_tokens(end, ends) for end in standing.interval)
        equal = describe_tokens(standing.equal, ends)
        rows.append([task, f"{100 * standing.score:.1f}", *cells, f"{equal}  [{low} … {high}]"])
    left = (0, len(heads) - 1)
    lines = ["", *markdown_table(rows, left=left)] if markdown else plain_table(rows, left=left)
    return [f"beside {comparison.model}, after {_short(comparison.tokens)} tokens:", *lines]


def _stand(curve: Curve, score: float, tokens: int, scores_D: Floats, acc_DP: Floats) -> Standing:
    """`scores_D` and `acc_DP` are draws of the score and of the curve's points."""
    reached = np.sort(_equal_tokens(curve.tokens, acc_DP, scores_D))
    left = np.sort(_equal_tokens(curve.tokens, acc_DP, scores_D, last=True))
    # Order statistics: an average of a number and infinity would say nothing.
    low, high = reached[round(0.025 * len(reached))], left[round(0.975 * len(left)) - 1]
    place = bisect.bisect_right(curve.tokens.tolist(), tokens)
    points = list(
        zip(curve.tokens.tolist(), curve.acc.tolist(), curve.stderr.tolist(), strict=True)
    )
    return Standing(
        score=score,
        before=points[place - 1] if place else None,
        after=points[place] if place < len(points) else None,
        equal=curve.equal_tokens(score),
        interval=(float(low), float(high)),
    )


def _equal_tokens(
    tokens_P: Floats, acc_DP: Floats, scores_D: Floats, *, last: bool = False
) -> Floats:
    """For each of D curves of P points, where its running best reaches its score; `last`: the last
    point at which it has no more, where several points have just that."""
    best_DP = np.maximum.accumulate(acc_DP, axis=1)
    reached_DP = best_DP >= scores_D[:, None]
    at_D = reached_DP.argmax(axis=1)
    before_D = np.maximum(at_D - 1, 0)
    rows = np.arange(len(scores_D))
    low, high = best_DP[rows, before_D], best_DP[rows, at_D]
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(high > low, (scores_D - low) / rise, 1.0)
    logs = np.log(tokens_P)
    found: Floats = np.exp(logs[before_D] + share * (logs[at_D] - logs[before_D]))
    # Logarithm and exponential would move a count that a checkpoint has exactly.
    found = np.where(scores_D == high, tokens_P[at_D], found)
    if last:
        at_last_D = (best_DP <= scores_D[:, None]).sum(axis=1) - 1
        found = np.where(scores_D == high, tokens_P[at_last_D], found)
    found = np.where((at_D == 0) & (scores_D < best_DP[:, 0]), 0.0, found)
    return np.where(reached_DP.any(axis=1), found, np.inf)


def _table() -> dict[str, Any]:
    text = (resources.files("matilda_train.evals") / "pythia_evals.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _short(tokens: float) -> str:
    if tokens >= 99.95e9:
        return f"{tokens / 1e9:.0f}B"
    return f"{tokens / 1e9:.1f}B" if tokens >= 0.995e9 else f"{tokens / 1e6:.3g}M"


def _point(point: tuple[float, float, float] | None) -> dict[str, float] | None:
    return None if point is None else dict(zip(("tokens", "acc", "stderr"), point, strict=True))


def _bound(tokens: float) -> float | str:
    if tokens == 0:
        return "below"
    return "beyond" if math.isinf(tokens) else round(tokens)
