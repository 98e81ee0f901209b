"""A pytest plugin (-p tests.cudabed.sparse): a few variants of each test, for runs that are slow."""

from __future__ import annotations

from itertools import groupby

import hypothesis

from tests.cudabed import check

VARIANTS = 2  # of each test function, evenly spaced over its parameters
EXAMPLES = 6  # of each test by hypothesis

_init = hypothesis.settings.__init__


def few(self, *args, **options) -> None:
    """settings(...) as the test modules call it, with fewer examples."""
    if "max_examples" in options:
        options["max_examples"] = min(options["max_examples"], EXAMPLES)
    _init(self, *args, **options)


hypothesis.settings.__init__ = few
check.SEEDS = range(1, 2)


def pytest_collection_modifyitems(config, items) -> None:
    kept = []
    for _, group in groupby(items, key=lambda item: (item.path, item.originalname)):
        variants = list(group)
        kept += variants[:: -(-len(variants) // VARIANTS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
