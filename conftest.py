"""Test options shared by the whole workspace."""

from __future__ import annotations

import os

import pytest

# Tensors in tests are tiny, and every core has a test process of its own already.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-slow", action="store_true", help="also run tests marked `slow` (minutes to hours)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # what a GPU needs is compiled by packages of others, which warn of each other
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
    if config.getoption("--run-slow") or os.environ.get("MATILDA_SLOW") == "1":
        return
    skip = pytest.mark.skip(reason="slow suite: run it with --run-slow or `make test-slow`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
