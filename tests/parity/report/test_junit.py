"""JUnit XML holds every verdict, and keeps to the schema that Jenkins, GitLab and others read."""

import re
from xml.etree import ElementTree

import pytest

from parity.records import OutError
from parity.report import check_junit, write_junit
from tests.parity.report import made_up

COUNTS = {"tests", "failures", "errors", "skipped", "time", "name"}
SCHEMA = {  # element: (required attributes, optional ones, children)
    "testsuites": (set(), COUNTS, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        COUNTS | {"timestamp", "hostname", "package", "id", "file"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name", "classname"},
        {"time", "file", "line", "status", "assertions"},
        {"skipped", "error", "failure", "properties", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "failure": (set(), {"message", "type"}, set()),
    "error": (set(), {"message", "type"}, set()),
    "skipped": (set(), {"message", "type"}, set()),
}


def faults(element):
    """Where a document breaks the schema."""
    required, optional, children = SCHEMA[element.tag]
    found = [f"{element.tag}: {name} is missing" for name in required - set(element.attrib)]
    found += [f"{element.tag}: {name} is not allowed" for name in set(element.attrib) - required - optional]
    for name in ("tests", "failures", "errors", "skipped"):
        if name in element.attrib and not re.fullmatch(r"\d+", element.attrib[name]):
            found.append(f"{element.tag}: {name} is no count")
    if "time" in element.attrib and not re.fullmatch(r"\d+\.\d+", element.attrib["time"]):
        found.append(f"{element.tag}: time is no decimal")
    if "timestamp" in element.attrib and not re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.attrib["timestamp"]
    ):
        found.append(f"{element.tag}: timestamp")
    for child in element:
        found += [f"{child.tag} in {element.tag}"] if child.tag not in children else faults(child)
    if element.tag == "testcase" and sum(child.tag in ("failure", "error", "skipped") for child in element) > 1:
        found.append("testcase: two outcomes")
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The document of the made-up results as other programs read it, and those results."""
    found = made_up.outcomes()
    ids = [entry.case for entry in found] + [made_up.NOT_RUN]
    path = tmp_path_factory.mktemp("junit") / "deeper" / "junit.xml"
    check_junit(path)
    write_junit(path, ids, {entry.case: entry for entry in found}, made_up.summary(found))
    return ElementTree.parse(path).getroot(), {entry.case: entry for entry in found}, path


def test_it_keeps_to_the_schema(written):
    assert faults(written[0]) == []


def test_the_check_of_the_schema_notices():
    broken = ElementTree.fromstring(
        '<testsuites><testsuite name="a" tests="x" errors="0"><note/></testsuite></testsuites>'
    )
    assert sorted(faults(broken)) == [
        "note in testsuite", "testsuite: failures is missing", "testsuite: tests is no count"
    ]  # fmt: skip


def test_every_case_is_a_test_case_with_its_verdict(written):
    root, found, _ = written
    cases = {element.get("name"): element for element in root.iter("testcase")}
    assert set(cases) == set(found) | {made_up.NOT_RUN}
    tags = {"pass": None, "fail": "failure", "error": "error", "skip": "skipped"}
    for text, outcome in found.items():
        outcomes = [child.tag for child in cases[text] if child.tag != "properties"]
        assert outcomes == [tag for tag in [tags[outcome.verdict]] if tag]
        assert float(cases[text].get("time")) == pytest.approx(outcome.seconds)
    assert cases[made_up.NOT_RUN].find("skipped").get("message") == "not run"
    suite = root.find("testsuite")
    assert [suite.get(name) for name in ("failures", "errors", "skipped")] == ["2", "1", "2"]
    assert suite.get("tests") == str(len(cases))


def test_a_case_says_mode_transport_margin_and_why(written):
    root, found, _ = written
    case = next(element for element in root.iter("testcase") if element.get("name") == made_up.SEP)
    assert case.get("classname") == "parity.EP+SP.allgather"
    values = {element.get("name"): element.get("value") for element in case.iter("property")}
    assert values["margin"] == "41.5"
    assert values["torch.observed_over_model"] == "31.2"
    failure = case.find("failure")
    assert failure.get("type") == "oracle"
    assert failure.get("message") == found[made_up.SEP].reason
    assert failure.text.splitlines()[1] == "exact: torch: rank 1: row 3"


def test_characters_that_xml_cannot_hold_are_left_out(written):
    root, _, path = written
    error = next(root.iter("error"))
    assert error.get("type") == "died"
    assert f"[31mred[0m {made_up.HOSTILE}" in error.text
    assert any(element.get("message") == "torch: no room " for element in root.iter("skipped"))
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", path.read_bytes())


def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    with pytest.raises(OutError, match=r"--junit .* cannot be written: Is a directory; give a file"):
        check_junit(tmp_path)
