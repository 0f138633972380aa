"""Complete a prompt with the newest healthy checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/generate.py --run runs/quickstart --prompt 'def '
  uv run apps/generate.py --run runs/hero --prompt 'The heart has' --temperature 0 --tokens 64
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--step", type=int, help="checkpoint step (default: newest healthy one)")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to add (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest (50)")
    parser.add_argument("--top-p", type=float, help="draw from this much probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import RunDir

    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train import complete_text, load_run_model

    model, tokenizer = load_run_model(args.run, step=args.step, device=args.device)
    print(
        complete_text(
            model,
            tokenizer,
            args.prompt,
            max_new_tokens=args.tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
    )
    return 0


if __name__ == "__main__":
    run_app(main)
