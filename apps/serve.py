"""Open a small web page to talk to a checkpoint and see what else each token might have been."""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import end_on_signals

end_on_signals()  # in the first line: loading a model takes time

import argparse
import signal

from matilda_train.app import add_checkpoint_options, run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/serve.py --run runs/quickstart
  uv run apps/serve.py --run runs/hero --step 20000 --port 8080 --device cuda

Then open the address it prints. From another machine, by SSH: ssh -L 8000:localhost:8000 HOST. The
page needs no network; Ctrl-C ends the server. Exit codes: 0 ended, 2 bad input or an address that
cannot be had, 4 no usable checkpoint.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    add_checkpoint_options(parser)
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: %(default)s, this machine only)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests made to this host name",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import RunDir

    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train.serve import open_server

    with open_server(
        args.run,
        step=args.step,
        device=args.device,
        host=args.host,
        port=args.port,
        names=args.allow_host,
    ) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        print(
            f"Step {server.card['step']:,} of {args.run}: {server.url} (Ctrl-C ends it)", flush=True
        )
        if server.is_open_to_others:
            print("There is no password: whoever can reach this machine can use it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    run_app(main)
