"""The frame: imports, budgets, a lean start, pinned names, documentation that runs."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rankwise as rw

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "rankwise"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports point down this list only (docs/design.md). Files of one level may use each other;
# packages of one level may not, except to a neighbour's protocol file. A protocol may also be
# named upwards by type checkers alone, as a Host names the Structure that asks of it.
LEVELS = [
    {"errors", "version", "ops"},
    {"weights"},
    {"host"},
    {"structures"},
    {
        "activity",
        "sites",
        "adapter",
        "siblings",
        "experts",
        "expert_loop",
        "graft",
        "candidates",
        "placement",
        "model_state",
        "losses",
        "stats",
    },
    {"inits", "solvers", "ranks", "penalties"},
    {"_recipe", "recipes", "registry", "methods", "io", "steps", "starting", "attachment"},
    {"lifecycle", "serve", "lab", "formats", "embedded"},
    {"hf", "testing"},
    {"select"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
PROTOCOLS = {
    "rankwise.ops.operator",
    "rankwise.weights.weight",
    "rankwise.structures.structure",
    "rankwise.inits.init",
    "rankwise.solvers.solver",
    "rankwise.ranks.ranks",
    "rankwise.penalties.penalty",
}
MAX_CODE_LINES = 17_050  # foundation 6,000, speed and plan, solvers and evidence to 13,000, then the structures
MAX_FILE_LINES = 400


# -- imports ------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def unit(module: str) -> str:
    """The part of a dotted name that has a level: 'rankwise.ops.atoms' -> 'ops'."""
    return (module.split(".") + ["__init__"])[1]


class Import(NamedTuple):
    target: str
    line: int
    typing: bool  # under "if TYPE_CHECKING:"


def imports(path: Path) -> Iterator[Import]:
    """Every import of a module of rankwise, those inside functions included."""
    here = module_name(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.split(".")[0] == "rankwise":
                yield Import(name, node.lineno, id(node) in typing)


EDGES = {path: list(imports(path)) for path in FILES}


def test_every_part_of_the_package_has_a_level():
    units = {unit(module) for module in MODULES}
    assert units <= LEVEL.keys(), f"give {sorted(units - LEVEL.keys())} a place in LEVELS"


def direction(source: str, edge: Import) -> str:
    """Where an edge points: "down", "sideways" or "up"."""
    other = unit(edge.target)
    if other == source or (edge.target in PROTOCOLS and edge.typing):
        return "down"
    if LEVEL[other] != LEVEL[source]:
        return "down" if LEVEL[other] < LEVEL[source] else "up"
    both_packages = all((PACKAGE / name).is_dir() for name in (source, other))
    return "sideways" if both_packages and edge.target not in PROTOCOLS else "down"


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(ROOT)}:{edge.line} imports {edge.target}: that is {way}"
        for path, edges in EDGES.items()
        for edge in edges
        if (way := direction(unit(module_name(path)), edge)) != "down"
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
    graph = {module_name(path): {edge.target for edge in edges if not edge.typing} for path, edges in EDGES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_plan_starts_without_a_trainer():
    """transformers' trainer imports PEFT and bitsandbytes where they are, for seconds."""
    reached, waiting = set(), ["rankwise.select", "rankwise.select.case"]
    while waiting:
        if (module := waiting.pop()) in reached:
            continue
        reached.add(module)
        path = MODULES[module]
        first = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        wrong = [text for text in map(ast.unparse, first) if re.search("from transformers.*([Tt]rain|set_seed)", text)]
        assert not wrong, f"{module}: {wrong[0]}"
        waiting += [edge.target for edge in EDGES[path] if edge.line in {node.lineno for node in first}]
    assert "rankwise.hf.prepare" in reached


# -- budgets ------------------------------------------------------------------------------------


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    scopes = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, scopes) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_code_lines_counts_code_alone():
    source = '"""Doc.\n\nMore."""\n\nimport os  # why\n\n# note\n'
    source += 'def f():\n    "doc"\n    return """a\nb"""\n'
    assert code_lines(source) == 4


def test_the_library_stays_small():
    total = sum(code_lines(path.read_text()) for path in FILES)
    assert total <= MAX_CODE_LINES, f"{total} lines of code in src, the budget is {MAX_CODE_LINES}"


def test_files_stay_readable():
    long = {module_name(p): n for p in FILES if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines, split by what they are about: {long}"


# -- a lean start -------------------------------------------------------------------------------


def python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


HEAVY = ["transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "typer", "bitsandbytes"]


def test_import_rankwise_is_lean():
    out = python(f"import sys, rankwise; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


def test_help_needs_no_torch():
    out = python(
        "import sys\n"
        "from rankwise.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('torch' in sys.modules)",
        "--help",
    )
    assert out.splitlines()[-1] == "False"
    assert "finetune" in out


# -- public names -------------------------------------------------------------------------------


PUBLIC = [
    "Adapter",
    "Recipe",
    "Sites",
    "Target",
    "__version__",
    "adapters",
    "attach",
    "catalogue",
    "collect",
    "compact",
    "disabled",
    "errors",
    "export",
    "linear_cross_entropy",
    "load",
    "merge",
    "merged",
    "plan",
    "recipe",
    "recipes",
    "route",
    "set_active",
    "targets",
]


def test_public_names_are_pinned():
    """A name is added on purpose and never lost: change this list in the same commit."""
    assert rw.__all__ == PUBLIC
    assert all(hasattr(rw, name) for name in rw.__all__)


# -- documentation that runs --------------------------------------------------------------------


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(line, docstring) of every function; a class's docstring stands for its __init__ too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef):
            doc = ast.get_docstring(node) or ""
            yield node.lineno, doc
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    yield inner.lineno, doc


def test_types_reach_a_users_checker():
    """PEP 561: without the marker a checker ignores the annotations of an installed package."""
    assert "Typing :: Typed" in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "src" / "rankwise" / "py.typed").read_bytes() == b""


def test_docstrings_agree_with_signatures():
    """pydoclint, but that a docstring may leave out arguments and result altogether."""
    done = subprocess.run(
        [sys.executable, "-m", "pydoclint.main", "-sfn", "True", "src"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(\S+\.py):(\d+): (DOC\d+): (.*)$", done.stdout + done.stderr, re.MULTILINE)
    assert found or done.returncode == 0, done.stderr[-2000:]
    docs = {name: dict(functions(ROOT / name)) for name in {row[0] for row in found}}
    wrong = [
        f"{name}:{line}: {code}: {text}"
        for name, line, code, text in found
        if "Args:" in docs[name].get(int(line), "Args:") or code not in ("DOC101", "DOC103", "DOC201")
    ]
    assert not wrong, "\n".join(wrong)


def runnable(path: Path, language: str) -> str:
    """The fenced blocks of a page that follow a line ``<!-- runs -->``, joined."""
    blocks = path.read_text().split("<!-- runs -->\n")[1:]
    fences = [block.split("```")[1] for block in blocks]
    bodies = [fence.removeprefix(language + "\n") for fence in fences]
    return "".join(b for b, fence in zip(bodies, fences, strict=True) if b != fence)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p, "python")], ids=lambda p: p.stem)
def test_python_of_the_manual_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = runnable(page, "python")
    exec(compile(source, str(page), "exec"), {"__name__": "manual"})


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p, "bash")], ids=lambda p: p.stem)
def test_commands_of_the_manual_run(page, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", runnable(page, "bash")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_method_table_is_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "gen_methods.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
