"""What a client may ask of the model, and the events that answer it."""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from matilda_data import Tokenizer
from matilda_model import Transformer, stream_choices
from matilda_train.sample import encode_prompt

__all__ = ["CompletionRequest", "complete"]

CANDIDATES = 10
MOST_STOPS = 8
MOST_STOP_CHARS = 100


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A prompt and how to draw from it; out of range is a `ValueError` of one sentence."""

    prompt: str = ""
    max_tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = 50
    """Draw from the k likeliest; null for all."""
    top_p: float | None = None
    """Draw from this much probability; null for all."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts after whose first appearance the completion ends."""

    @classmethod
    def from_json(cls, value: object) -> CompletionRequest:
        """Read a decoded JSON body; unknown names and wrong types are a `ValueError`."""
        if not isinstance(value, dict):
            raise ValueError('The body must be a JSON object, such as {"prompt": "The heart"}.')
        names = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(names)}."
                raise ValueError(f"`{name}` is not a field of a completion; {hint}")
        if isinstance(stop := value.get("stop"), list):
            value = value | {"stop": tuple(stop)}
        return cls(**value)

    def __post_init__(self) -> None:
        _require(isinstance(self.prompt, str), "prompt", "a text")
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "1 or more")
        good = _is_number(self.temperature) and 0 <= self.temperature <= 100
        _require(good, "temperature", "between 0 and 100")
        good = self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1)
        _require(good, "top_k", "1 or more, or null")
        good = self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1)
        _require(good, "top_p", "above 0 and at most 1, or null")
        _require(_is_int(self.seed) and 0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1")
        good = (
            isinstance(self.stop, tuple)
            and len(self.stop) <= MOST_STOPS
            and all(isinstance(s, str) and 1 <= len(s) <= MOST_STOP_CHARS for s in self.stop)
        )
        what = f"a list of at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARS} characters"
        _require(good, "stop", what)


def complete(
    model: Transformer, tokenizer: Tokenizer, request: CompletionRequest
) -> Iterator[dict[str, Any]]:
    """Events of one completion: a `token` each, then `end` with its reason.

    A `token` has its text (up to the last whole character; `partial` says that one is not), its
    probability and the likeliest candidates as `[text, probability]`, null standing for the end of
    the document. The reason is `end of text`, `stop`, `length`, or `room` where the model's longest
    sequence is full. Raises `ValueError` when the prompt leaves no room.
    """
    ids = encode_prompt(tokenizer, request.prompt, model.config.max_seq_len)
    room = model.config.max_seq_len - len(ids)
    began, count, text = time.monotonic(), 0, ""
    most = min(request.max_tokens, room)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    longest_stop = max(map(len, request.stop), default=0)
    reason = "end of text"
    for choice in stream_choices(
        model,
        ids,
        max_new_tokens=most,
        candidates=CANDIDATES,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop_ids=(tokenizer.eot_id,),
        vocab_limit=tokenizer.vocab_size,
        generator=torch.Generator(device=model.embed.weight.device).manual_seed(request.seed),
    ):
        count += 1
        new = decoder.decode(tokenizer.decode_bytes([choice.token]))
        text = text[-longest_stop:] + new
        yield {
            "event": "token",
            "text": new,
            "partial": bool(decoder.getstate()[0]),
            "name": _name(tokenizer, choice.token),
            "probability": choice.probability,
            "candidates": [[_name(tokenizer, i), p] for i, p in choice.candidates],
        }
        if any(stop in text for stop in request.stop):
            reason = "stop"
            break
        if count == most:
            reason = "length" if most == request.max_tokens else "room"
    yield {
        "event": "end",
        "reason": reason,
        "text": decoder.decode(b"", final=True),
        "tokens": count,
        "seconds": round(time.monotonic() - began, 3),
    }


def _name(tokenizer: Tokenizer, token: int) -> str | None:
    """A token as text, parts of characters as `\\xNN`; None for end-of-text."""
    if token == tokenizer.eot_id:
        return None
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")


def _require(condition: bool, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {expected}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
