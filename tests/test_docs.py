"""The pages in docs/ agree with the code: names, tables, pictures, links, and the examples that say they run."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_moe.kernels import tiles
from parity import backends, delivery, grids, mutations, report, tolerance
from parity.backends.base import Options
from parity.case import FLAGS, FORMATS, TRANSPORTS, Case
from parity.stages import NAMES, STAGES
from parity.verdict import GATES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOMS = ("jax_moe", "torch_moe", "parity", "tests", "docs")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.*?)^```$", re.M | re.S)
PLACEHOLDER = "NAME"


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def code_words(text):
    """Every word inside backticks."""
    return set(re.findall(r"[\w.-]+", " ".join(re.findall(r"`([^`\n]+)`", FENCED.sub("", text)))))


def table_rows(text, first_cell):
    """The rows of the Markdown table whose head starts with `first_cell`, the head first."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def exports(package):
    """Public names of a package's `__init__`, read and not imported."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def config_fields(package):
    """Field names of every dataclass in a package's config module, read and not imported."""
    tree = ast.parse((ROOT / package / "config.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert classes
    return {item.target.id for node in classes for item in node.body if isinstance(item, ast.AnnAssign)}


def headings(text):
    """Anchors of a page, as the site makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


# Links, files, pages.
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        found = path if not name else (path.parent / name).resolve()
        assert found.is_file(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in headings(found.read_text(encoding="utf-8")), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_file_a_page_names_exists(path):
    text = re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8"))
    for name in re.findall(rf"\b(?:{'|'.join(ROOMS)})/[\w./-]*", text):
        name = name.rstrip(".")
        if PLACEHOLDER not in name:
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_every_page_is_in_the_navigation_and_nothing_comes_from_the_network():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", settings))
    assert listed == {str(path.relative_to(DOCS)) for path in PAGES}
    assert "font: false" in settings
    assert "http" not in settings
    assert not [path.name for path in PAGES if re.search(r"<(script|link|iframe)\b", path.read_text(encoding="utf-8"))]


def test_every_page_of_the_design_is_linked_from_the_start():
    links = set(re.findall(r"\]\(([\w/-]+\.md)", page("index.md")))
    assert links >= {str(path.relative_to(DOCS)) for path in PAGES} - {"index.md", "kernels.md"}


# What pages say, against the code.
@pytest.mark.parametrize("package", ["jax_moe", "torch_moe"])
def test_every_public_symbol_has_its_line(package):
    rows = {cell.strip("`") for row in table_rows(page(f"api/{package}.md"), "symbol")[1:] for cell in row[:1]}
    assert rows == exports(package)


def test_the_table_of_tiles_is_the_one_that_is_used():
    said = []
    for most, gated, plain in tiles.TABLE:
        bound = "more" if most == float("inf") else f"up to {most:g}"
        second = "the same" if plain == gated else plain.words
        measured = dict.fromkeys((gated.measured, plain.measured))
        said.append([bound, gated.words, second, "; ".join(measured)])
    assert table_rows(page("kernels.md"), "mean rows of an expert")[1:] == said


@pytest.mark.parametrize("package", ["jax_moe", "torch_moe"])
def test_every_configuration_field_is_described(package):
    assert config_fields(package) <= code_words(page("notation.md"))


@pytest.mark.parametrize("package", ["jax_moe", "torch_moe"])
def test_every_parameter_of_a_checkpoint_is_named(package):
    source = (ROOT / package / "params.py").read_text(encoding="utf-8")
    names = set(re.findall(r'"((?:experts|router|shared|latent)\.\w+)"', source))
    rows = table_rows(page("notation.md"), "name")[1:]
    assert {word for row in rows for word in re.findall(r"`([^`]+)`", row[0])} == names


def test_every_flag_option_format_and_transport_is_described():
    text, words = page("parity.md"), code_words(page("parity.md"))
    assert {part.strip() for key in FLAGS for part in key.split(",")} <= words
    assert set(TRANSPORTS) | set(FORMATS) <= words
    source = (ROOT / "parity" / "cli.py").read_text(encoding="utf-8")
    options = set(re.findall(r'"(--?[a-z][a-z-]*)"', source)) - {"-h", "--help"}
    assert options
    assert options <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_what_each_hugging_face_block_can_do_is_what_is_said():
    rows = {row[0].strip("`"): row[1:] for row in table_rows(page("extending.md"), "framework")[1:]}
    assert set(rows) == set(backends.chosen("hf-*"))
    for name, (block, needed, possible) in rows.items():
        backend = backends.load(name, Options())
        assert block == f"`{backend.block_class}`"
        needs, options = backend.capabilities.needs, backend.capabilities.options
        assert (code_words(needed), code_words(possible)) == (set(needs), set(options - needs))


def test_every_gate_planted_bug_and_built_in_grid_is_described():
    text, words = page("parity.md"), code_words(page("parity.md"))
    assert [row[0].strip("`") for row in table_rows(text, "gate")[1:]] == list(GATES)
    bugs = {row[0].strip("`"): (row[2], tuple(row[3].split(", "))) for row in table_rows(text, "bug")[1:]}
    assert bugs == {mutation.name: (mutation.stage, mutation.gates) for mutation in mutations.CATALOG}
    assert set(grids.BUILT_IN) | set(backends.DEFAULT) <= words
    assert f"`vllm` ({len(grids.load('vllm'))} cases)" in text
    assert f"`transports` ({len(grids.load('transports'))} cases" in text


def test_the_capability_table_is_the_one_that_parity_prints():
    head, *rows = table_rows(page("transports.md"), "transport")
    shown = {row[0]: dict(zip(head[1:], [cell == "yes" for cell in row[1:]], strict=True)) for row in rows}
    assert shown == report.capabilities()
    assert all(cell in ("yes", "-") for row in rows for cell in row[1:])


def numbers(text):
    return [] if text == "none" else [int(word) for word in text.split(", ")]


def test_the_worked_drops_are_those_of_the_rules():
    ids = np.array([numbers(row[1]) for row in table_rows(page("transports.md"), "token")[1:]])
    homes = [int(row[2]) for row in table_rows(page("transports.md"), "token")[1:]]
    assert homes == [0, 0, 0, 0, 1, 1, 1]
    for _, chosen, _, copies in table_rows(page("transports.md"), "token")[1:]:
        assert sorted({expert // 2 for expert in numbers(chosen)}) == numbers(copies)
    head, *rows = table_rows(page("transports.md"), "on each rank")
    for column, flag in enumerate(head[1:], start=1):
        shown = {row[0]: numbers(row[column]) for row in rows}
        flag = flag.strip("`")
        transport = "padded" if flag.startswith("capacity") else "ragged"
        case = Case.parse(f"dp2.tp1.ep/{transport}/bf16/t4-3.d8.f8/e4.k2/{flag}")
        ranks = delivery.deliver(case, ids)
        kept = delivery.kept(case, ids)
        expected = {f"arrive on rank {rank}": ranks[rank].tokens.tolist() for rank in range(2)}
        expected["dropped by rank 0, rank 1"] = [rank.dropped for rank in ranks]
        listed = {int(name.removeprefix("ids left to token ")) for name in shown if name.startswith("ids left")}
        expected |= {f"ids left to token {token}": ids[token][kept[token]].tolist() for token in listed}
        assert shown == expected
        assert kept[[token for token in range(len(ids)) if token not in listed]].all()


def test_over_two_nodes_tokens_lie_in_the_order_that_is_stated():
    case = Case.parse("dp4.tp1.ep.nodes2/ragged/bf16/t1.d8.f8/e4.k4")
    orders = {tuple(rank.tokens) for rank in delivery.deliver(case, np.tile(np.arange(4), (4, 1)))}
    assert len(orders) == 1
    assert "in the order " + ", ".join(map(str, orders.pop())) in page("transports.md")


def test_estimates_are_what_the_script_prints():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(DOCS / "estimate_table.py")]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    tables = printed.strip().split("\n\n")
    assert len(tables) == 5
    assert [table for table in tables if table not in page("transports.md")] == []


def test_the_modes_in_the_table_are_those_of_their_ids():
    for mode, case, *_ in table_rows(page("parallelism.md"), "mode")[1:]:
        parallel = case.strip("`")
        transport = "allgather" if ".ep" in parallel else "local"
        assert Case.parse(f"{parallel}/{transport}/bf16/t8.d8.f8/e8.k2").mode == mode


def test_ids_in_the_text_can_be_parsed():
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    ids = [
        word for text in texts for word in re.findall(r"dp\d+\.tp\d+[\w.]*/\w+/\w+/t[\w.-]+/e\d+\.k\d+[\w+/-]*", text)
    ]
    assert len(ids) >= 5
    for text in ids:
        Case.parse(text)


def test_the_constants_of_the_error_model_are_the_ones_explained():
    text = page("numerics.md")
    assert f"`RMS = {tolerance.RMS}`" in text
    assert f"`SLACK = {tolerance.SLACK}`" in text
    assert f"`SIGMAS = {tolerance.SIGMAS}`" in text
    assert f"`FALSE_ALARM = {tolerance.FALSE_ALARM:.0e}`".replace("e-09", "e-9") in text
    assert "`SENSITIVITY = 1/3`" in text
    assert tolerance.SENSITIVITY == 1 / 3
    head, row = table_rows(text, "n")
    chance = [tolerance.Errors.of(np.ones((1, int(n))), int(n)).most()[0] / int(n) for n in head[1:]]
    assert [f"{np.sqrt(each):.2f}" for each in chance] == row[1:]


def test_the_rms_of_one_rounding_is_what_rounding_shows():
    import ml_dtypes

    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    error = values.astype(ml_dtypes.bfloat16).astype(np.float64) - values
    observed = np.sqrt((error**2).sum() / (values.astype(np.float64) ** 2).sum()) / tolerance.UNIT_ROUNDOFF["bf16"]
    assert f"{observed:.3f} u" in page("numerics.md")


def test_the_share_of_pre_activations_is_what_the_slopes_give():
    from parity.case import Flags
    from parity.oracle.activation import activate

    rng, step = np.random.default_rng(0), 1e-6
    gate, up = rng.standard_normal(100_000), rng.standard_normal(100_000)
    for name, share, *_ in table_rows(page("numerics.md"), "activation")[1:]:
        flags = Flags(activation={"gated silu": "silu"}.get(name, name.strip("`")))
        other = None if name == "`relu2`" else up
        h = activate(gate, other, flags)
        variance = (gate * (activate(gate + step, other, flags) - h) / step) ** 2
        if other is not None:
            variance = variance + (up * (activate(gate, up + step, flags) - h) / step) ** 2
        assert variance.mean() / (h**2).mean() == pytest.approx(float(share), rel=0.05), name


def test_the_measured_tables_have_the_rows_of_the_script_and_no_margin_above_one():
    script = load_script(DOCS / "measure_error_model.py")
    for title, rows in script.TABLES.items():
        head, *shown = table_rows(page("numerics.md").split("## Measured")[1], title)
        assert [row[0] for row in shown] == [label for label, _ in rows]
        assert head[1:] == [f"{name} {fmt}" for fmt in script.FORMATS for name in backends.DEFAULT]
        margins = [float(m) for row in shown for cell in row for m in re.findall(r"\((\d\.\d\d)\)", cell)]
        assert len(margins) == len(shown) * (len(head) - 1)
        assert max(margins) < 1
        for _, text in rows:
            for fmt in script.FORMATS:
                Case.parse(text.format(fmt))


def test_the_measured_stages_are_all_there_and_the_plot_is_of_the_points_that_are_kept():
    script = load_script(DOCS / "measure_error_model.py")
    head, *shown = table_rows(page("numerics.md").split("## Measured")[1], "stage")
    assert [row[0] for row in shown] == [stage.title for stage in STAGES]
    assert head[1:] == [f"{name} {fmt}" for fmt in script.FORMATS for name in backends.DEFAULT]
    margins = [float(m) for row in shown for cell in row for m in re.findall(r"to (\d\.\d\d)\)", cell)]
    assert len(margins) > 30
    assert max(margins) <= 1
    data = json.loads(script.DATA.read_text(encoding="utf-8"))
    assert list(data) == head[1:]
    assert script.PLOT.read_text(encoding="utf-8") == script.draw(data)
    # every stage, dtype and framework of the sweep within a factor of its prediction, and none beyond the bound's slack
    ratios = [observed / predicted for points in data.values() for predicted, observed in points]
    assert len(ratios) > 500
    assert max(ratios) < tolerance.SLACK


def test_the_error_models_by_stage_are_those_of_the_code():
    rows = {
        row[0].strip("`"): row[2] for row in table_rows(page("numerics.md").split("## Stage by stage")[1], "stage")[1:]
    }
    assert list(rows) == list(tolerance.STAGE_ERRORS) == list(NAMES)
    said = {"yes": "yes", "no": "no", "may": "may be"}
    assert all(rows[name].startswith(said[error.rounds]) for name, error in tolerance.STAGE_ERRORS.items())


def test_pictures_are_what_the_script_draws():
    drawn = load_script(DOCS / "pictures" / "draw.py").pictures()
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert set(on_disk) == set(drawn)
    assert [name for name in drawn if on_disk[name] != drawn[name]] == []
    shown = set(re.findall(r"pictures/([\w.]+)", page("parallelism.md")))
    assert shown == set(drawn)


# Examples.
@dataclasses.dataclass(frozen=True)
class Example:
    name: str
    line: int
    source: str


def examples():
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in RUNNABLE.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append(Example(str(path.relative_to(DOCS)), line, match[1]))
    return found


def test_python_blocks_marked_runnable_run(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch")
    found = examples()
    assert len(found) >= 4
    # One process for all, since importing the frameworks is most of the time; each block has a namespace of its own.
    lines = ["import sys, traceback", "failed = False"]
    for example in found:
        where = f"{example.name}:{example.line}"
        padded = "\n" * (example.line - 1) + example.source
        lines += [
            "try:",
            f"    exec(compile({padded!r}, {example.name!r}, 'exec'), {{'__name__': {where!r}}})",
            "except Exception:",
            f"    failed = True; print('FAILED', {where!r}); traceback.print_exc(file=sys.stdout)",
        ]
    script = tmp_path / "examples.py"
    script.write_text("\n".join([*lines, "sys.exit(failed)"]), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
