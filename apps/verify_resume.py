"""Kill a run again and again, resume it, and compare it bit for bit with an undisturbed twin."""

from __future__ import annotations

import argparse
from pathlib import Path

from matilda_train.app import run_app

EXAMPLES = """examples:
  uv run apps/verify_resume.py --config configs/verify_resume.json --kills 500 --run-dir /tmp/proof
  uv run apps/verify_resume.py --config configs/base_124m.json --kills 5 --run-dir /tmp/proof \\
      --data-dir data/corpus --set train.total_steps=60 train.deterministic=true

Exit codes: 0 no difference; 1 a difference, listed; 2 bad input.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="JSON config of the run")
    parser.add_argument("--kills", type=int, default=20, help="lives to end (20)")
    parser.add_argument("--run-dir", required=True, type=Path, help="new directory for all runs")
    parser.add_argument("--data-dir", type=Path, help="prepared data set (default: data.dir)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill points (0)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="config overrides"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import TerminalDisplay
    from matilda_train.verify_resume import verify_resume

    with TerminalDisplay() as display:
        report = verify_resume(
            args.config,
            work_dir=args.run_dir,
            data_dir=args.data_dir,
            kills=args.kills,
            overrides=args.set,
            seed=args.seed,
            display=display,
        )
    print(f"{report.n_kills} lives ended, {report.runs} runs compared with their twin")
    for (name, phase), count in sorted(report.kills.items()):
        print(f"  {name:8} while {phase:12} {count:5}")
    print(f"{len(report.differences)} differences")
    for difference in report.differences[:20]:
        print(f"  {difference}")
    return 1 if report.differences else 0


if __name__ == "__main__":
    run_app(main)
