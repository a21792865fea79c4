import functools
import hashlib

import pytest

from parity import fixtures
from parity.case import Case
from parity.oracle import reference, teach


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("fixtures")


@pytest.fixture(scope="session")
def oracle(cache):
    """case id -> (case, arrays, reference)."""

    def answer(text):
        case = Case.parse(text)
        arrays = fixtures.build(case, cache)
        return case, arrays, reference(case, arrays)

    return answer


@pytest.fixture(scope="session")
def teacher(cache):
    """case id -> (case, arrays, reference with stages), the lessons written."""

    @functools.cache
    def answer(text):
        case = Case.parse(text)
        arrays = fixtures.build(case, cache)
        folder = cache.parent / f"lessons-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return case, arrays, teach(case, arrays, folder)[0]

    return answer
