"""Ablation studies: one change a row, paired seeds, resumable, with a statement about noise.

study = Study(rows=resolve_rows(config, ["no_qk_norm", "mha"]), seeds=3, out=Path("runs/study"))
run_study(study, data_dir=..., display=StudyTerminal())
result = read_study(study)
"""

from __future__ import annotations

from matilda_train.ablation.display import StudyTerminal
from matilda_train.ablation.document import describe_study, write_document
from matilda_train.ablation.grid import (
    describe_grid,
    grid_rows,
    rank_grid,
    run_halving,
    write_grid,
)
from matilda_train.ablation.plan import Job, Study
from matilda_train.ablation.results import RowResult, StudyResult, read_study
from matilda_train.ablation.run_result import EarlierRuns, RunResult, read_earlier
from matilda_train.ablation.runner import Ending, Progress, StudyDisplay, places, run_study
from matilda_train.ablation.significance import compare_rows, steps_saved
from matilda_train.ablation.variants import VARIANTS, Row, resolve_rows

__all__ = [
    "VARIANTS",
    "EarlierRuns",
    "Ending",
    "Job",
    "Progress",
    "Row",
    "RowResult",
    "RunResult",
    "Study",
    "StudyDisplay",
    "StudyResult",
    "StudyTerminal",
    "compare_rows",
    "describe_grid",
    "describe_study",
    "grid_rows",
    "places",
    "rank_grid",
    "read_earlier",
    "read_study",
    "resolve_rows",
    "run_halving",
    "run_study",
    "steps_saved",
    "write_document",
    "write_grid",
]
