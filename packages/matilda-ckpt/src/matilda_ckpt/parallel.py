"""Run one function over several items in threads that also work while Python shuts down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def each(call: Callable[[str], T], items: Sequence[str], threads: int) -> list[T]:
    """`call` on every item; after an error no new item begins, and the first error is raised.

    Plain threads, because an executor refuses work once the interpreter is exiting, and a save
    that is under way then must still end.
    """
    if threads <= 1 or len(items) <= 1:
        return [call(item) for item in items]
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(enumerate(items))
    guard = threading.Lock()

    def work() -> None:
        while True:
            with guard:
                index, item = next(waiting, (-1, ""))
                if index < 0 or errors:
                    return
            try:
                result = call(item)
            except BaseException as error:
                with guard:
                    errors.append(error)
                return
            with guard:
                results[index] = result

    workers = [
        threading.Thread(target=work, name="matilda-ckpt-io")
        for _ in range(min(threads, len(items)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
