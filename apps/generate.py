"""Complete a prompt with the newest healthy checkpoint of a run."""

from __future__ import annotations

import argparse
from typing import Any

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_checkpoint_options, add_json_option, run_app, show
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/generate.py --run runs/quickstart --prompt 'def '
  uv run apps/generate.py --run runs/quickstart --prompt 'import ' --temperature 0 --tokens 64
  uv run apps/generate.py --run runs/hero --step 20000 --prompt 'The heart has' --seed 7

Exit codes: 0 done, 2 bad input, 4 no usable checkpoint.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    add_checkpoint_options(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    add = parser.add_argument
    add("--tokens", type=int, default=200, metavar="N", help="most to add (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="0 takes the likeliest token every time (default: %(default)s)",
    )
    add(
        "--top-k",
        type=int,
        default=50,
        metavar="N",
        help="draw from the N likeliest tokens (default: %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="draw from the likeliest tokens that have this share of the probability, above 0 to 1 "
        "(default: all of --top-k)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`--prompt` is not UTF-8 at character {error.start}; give it in UTF-8."
        ) from None
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"`--seed` is {args.seed}, but must fit 64 bits.")
    if args.tokens < 1:
        raise ValueError(f"`--tokens` must be 1 or more, not {args.tokens}.")
    if not args.temperature >= 0:
        raise ValueError(f"`--temperature` must be 0 or more, not {args.temperature:g}.")
    if args.top_k < 1:
        raise ValueError(f"`--top-k` must be 1 or more, not {args.top_k}.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"`--top-p` must be above 0 and at most 1, not {args.top_p:g}.")
    from matilda_train import RunDir

    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train import complete_text
    from matilda_train.trained_model import load_trained

    trained = load_trained(args.run, step=args.step, device=args.device)
    draw: dict[str, Any] = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    text = complete_text(
        trained.model, trained.tokenizer, args.prompt, max_new_tokens=args.tokens, **draw
    )
    completion = text.removeprefix(args.prompt)
    found = {"run": str(args.run), "step": trained.step, **draw}
    show(text, {**found, "prompt": args.prompt, "completion": completion}, args.json)
    return 0


if __name__ == "__main__":
    run_app(main)
