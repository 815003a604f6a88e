"""Keeps the house as it is drawn: who may import whom, where files live, how long they may be, what an import costs."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The modules of fastrnn/. A row is one idea in one file or several, the lowest row first; a file imports only from its
# own row and from rows below it. NUMBERS knows tensors and token ids, TEXT knows strings, neither imports the other;
# PRODUCT stands on both. ALONE serves everyone and imports nothing of ours.
ALONE = ("checkpoint", "config", "devices", "shuffle")
NUMBERS = (
    ("reference", "reference_sample"),
    ("extension",),
    ("backends", "gpu", "aten", "library", "ops", "direct"),
    ("sampling",),
    ("cells", "layers", "conversion"),
    ("network", "inference", "sequence", "storage"),
    ("request", "engine", "native", "graphed", "generate", "likelihood"),
)
TEXT = (
    ("text", "textkinds", "textstream", "tokenizer", "reading"),
    ("data", "corpora", "news", "batching", "streams", "windows"),
)
PRODUCT = (
    ("models", "defaults", "planning", "results"),
    ("train", "trainer", "prepare", "evaluate", "metrics"),
    ("tutorials", "recipes"),
    ("info", "jsonl", "demo"),
    ("cli", "__main__"),  # and every cli_*
)

# What the root of the repository may hold.
TOP_LEVEL = set(
    ".ci .clang-format .gitignore bench CHANGELOG.md constraints.txt CONTRIBUTING.md csrc fastrnn kernels LICENSE "
    "Makefile MANIFEST.in pyproject.toml README.md recipes setup.py tests".split()
)

FILE_LINES = 400
FUNCTION_LINES = 60
CODE = {".py", ".c", ".cpp", ".h", ".cu", ".cuh", ".inc"}

# Seconds of processor time that fastrnn itself may take to import once torch is there. Measured: 0.01.


def tracked() -> list[Path]:
    """The files under version control or about to be; skips where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("needs a git checkout: an unpacked sdist cannot tell its own files from others")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def named(node: ast.AST) -> set[str]:
    """The fastrnn modules that one node imports, or names in a string such as "fastrnn.ops" for importlib."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastrnn.")}
    if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "fastrnn"):
        below = (node.module or "").split(".")[0 if node.level else 1 :]
        return {below[0]} if below and below[0] else {alias.name for alias in node.names}
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"fastrnn\.\w+", node.value):
        return {node.value.split(".")[1]}
    return set()


def own_imports(name: str) -> set[str]:
    """The fastrnn modules that a module imports anywhere in its file, functions included."""
    tree = ast.parse((ROOT / "fastrnn" / f"{name}.py").read_text(encoding="utf-8"))
    return set().union(*(named(node) for node in ast.walk(tree)))


MODULES = sorted(path.stem for path in (ROOT / "fastrnn").glob("*.py") if path.stem != "__init__")


def place(name: str) -> tuple[str, int]:
    """The column and row of a module; KeyError when the picture does not have it."""
    if name in ALONE:
        return "ALONE", 0
    if name.startswith("cli_"):
        return place("cli")
    for column, rows in (("NUMBERS", NUMBERS), ("TEXT", TEXT), ("PRODUCT", PRODUCT)):
        for height, row in enumerate(rows):
            if name in row:
                return column, height
    raise KeyError(name)


def test_the_picture_holds_every_module_once() -> None:
    placed = [*ALONE, *(name for rows in (NUMBERS, TEXT, PRODUCT) for row in rows for name in row)]
    present = [name for name in MODULES if not name.startswith("cli_")]
    assert sorted(placed) == present, "fastrnn/ and the picture at the top of this file differ"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_upward(name: str) -> None:
    column, height = place(name)
    for other in own_imports(name) & set(MODULES) - {name}:
        other_column, other_height = place(other)
        if other_column == column:
            allowed = other_height <= height and column != "ALONE"
        else:
            allowed = other_column == "ALONE" or column == "PRODUCT"
        assert allowed, f"{name} ({column} row {height}) imports {other} ({other_column} row {other_height})"


def test_modules_can_be_loaded_in_some_order() -> None:
    """No circle among the imports at module level; inside a function a module may name one of its own row."""
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        body = ast.parse((ROOT / "fastrnn" / f"{name}.py").read_text(encoding="utf-8")).body
        graph[name] = set().union(*(named(node) for node in body)) & set(MODULES)
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("reference") < order.index("models")


def test_one_module_loads_the_extension() -> None:
    assert [name for name in MODULES if "_C" in own_imports(name)] == ["extension"]


def test_the_root_holds_only_what_it_may() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert found <= TOP_LEVEL, f"not in the list: {sorted(found - TOP_LEVEL)}"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_name_a_cell_and_you_know_its_files(cell: str) -> None:
    defined = {
        node.name
        for node in ast.parse((ROOT / "fastrnn" / "reference.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {f"{cell}_forward", f"{cell}_backward"} <= defined
    assert (ROOT / "csrc" / "cpu" / f"{cell}.cpp").is_file()
    assert (ROOT / "kernels" / f"{cell}.py").is_file()
    for tests in ("test_reference.py", "test_ops.py", "test_cpu_cells.py", "test_triton_cells.py"):
        assert re.search(rf"\b{cell}\b", (ROOT / "tests" / tests).read_text(encoding="utf-8")), f"{tests} omits {cell}"


def test_only_the_bindings_see_torch_and_only_the_module_sees_python() -> None:
    torch_header = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")
    python_header = re.compile(r"#\s*include\s*[<\"]Python\.h")
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in CODE]
    assert len(sources) > 5
    bindings = {p.name for p in (ROOT / "csrc").glob("bindings*.cpp")}
    users = {p.name for p in sources if '#include "bindings.h"' in p.read_text(encoding="utf-8")}
    assert users == bindings, "only the bindings may include bindings.h"
    seen = {p.name for p in sources if torch_header.search(p.read_text(encoding="utf-8"))}
    assert "bindings.h" in seen <= bindings | {"bindings.h"}
    assert {p.name for p in sources if python_header.search(p.read_text(encoding="utf-8"))} == {"pyinit.c"}


def code_files() -> list[Path]:
    return [path for path in tracked() if path.suffix in CODE]


CLASS_OR_NAMESPACE = re.compile(r"(template <.*> *)?(class|struct|union|enum|namespace|extern \"C\" \{)")


def functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function of a file.

    In C++, of every block that opens and closes at the left margin, where clang-format puts functions; namespaces close
    with a comment and so do not count, nor do classes.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    found, start = [], None
    for number, line in enumerate(text.splitlines()):
        if line.endswith("{") and line[0] not in " }/" and not CLASS_OR_NAMESPACE.match(line):
            start = number
        elif line == "}" and start is not None:
            found.append((text.splitlines()[start], number - start + 1))
            start = None
    return found


def test_files_stay_short_enough_to_read() -> None:
    long = {str(p.relative_to(ROOT)): n for p in code_files() if (n := len(p.read_text().splitlines())) > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines: split along an idea, {long}"


def test_functions_stay_short_enough_to_read() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name}: {lines} lines"
        for path in code_files()
        for name, lines in functions(path)
        if lines > FUNCTION_LINES
    ]
    assert not long, "\n".join(long)
    assert len(functions(ROOT / "csrc" / "cpu" / "draw_general.h")) > 5, "the count of functions in C++ finds none"


def test_no_file_names_a_machine() -> None:
    """Paths of one machine and names of package indexes stay out of the repository. Spelt so as not to find itself."""
    words = [r"/wor[k]/", r"/roo[t]/", r"/hom[e]/\w", r"/opt/whee[l]", r"/tm[p]/\w", r"pypi\.or[g]", r"pythonhoste[d]"]
    pattern = re.compile("|".join(words))
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_import_is_cheap_and_touches_neither_compiler_nor_extension() -> None:
    heavy = ["triton", "fastrnn._C", "fastrnn.kernels", "torch._inductor", "tokenizers", "safetensors", "matplotlib"]
    code = f"""
import sys, torch
before = set(sys.modules)
import fastrnn
print(*sorted(set({heavy}) & (set(sys.modules) - before)))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "an import warns about nothing"
    assert done.stdout.strip() == "", f"import fastrnn imports {done.stdout}"


@pytest.mark.parametrize("command", [(), ("demo",), ("train",), ("generate",), ("score",), ("info",)])
def test_help_does_not_wait_for_torch(command: tuple[str, ...]) -> None:
    done = run_python("-X", "importtime", "-m", "fastrnn", *command, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: fastrnn" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "triton", "tokenizers", "safetensors"}


def test_every_public_name_resolves() -> None:
    code = "import fastrnn; print(*[n for n in fastrnn.__all__ if getattr(fastrnn, n, None) is None])"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_bare_name_kernels_is_refused() -> None:
    done = run_python("-c", "import kernels")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "fastrnn.kernels" in done.stderr
