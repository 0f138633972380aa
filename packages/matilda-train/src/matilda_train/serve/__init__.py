"""A small web page to talk to a checkpoint, and the server behind it, of the standard library."""

from __future__ import annotations

from matilda_train.serve.completion import CompletionRequest, complete
from matilda_train.serve.server import CompletionServer, open_server
from matilda_train.serve.turnstile import BusyError, Turnstile

__all__ = [
    "BusyError",
    "CompletionRequest",
    "CompletionServer",
    "Turnstile",
    "complete",
    "open_server",
]
