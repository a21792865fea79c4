import pytest

from parity import fixtures
from parity.case import Case
from parity.oracle import reference


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
