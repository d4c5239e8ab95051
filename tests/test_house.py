"""The shape of the house, read off the syntax trees: which file may import what, and what may be named where."""

import ast
import re
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for folder in ("hybridiff", "models", "weights")
    for path in (ROOT / folder).rglob("*.py")
    if "demo" not in path.parent.name
) + [ROOT / "train_free_sample.py"]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
PROGRAM = ("hybridiff/app/", "train_free_sample.py")
METHOD = [
    name
    for name in TREES
    if name.startswith("hybridiff/") and not name.startswith(("hybridiff/app/", "hybridiff/distributed/"))
]
NETWORKS = {"UNet", "UNetConfig", "UNetConditioning", "MMDiT", "MMDiTConfig", "MMDiTConditioning"}
PRIVATE = {
    "told",
    "say",
    "shown",
    "meet",
    "settle",
    "farewell",
    "made_by",
    "leaves",
    "ring",
    "Value",
    "Hand",
    "agree",
    "sniff",
    "said",
    "team",
    "lane",
    "rings",
    "gather",
}


def imports(tree: ast.Module) -> set[str]:
    """Full names of the modules that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def strings(tree: ast.Module) -> list[str]:
    """String constants, docstrings aside."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str) and value not in docs]


def identifiers(tree: ast.Module) -> set[str]:
    """Names that a file defines or uses: variables, arguments, functions, classes, attributes."""
    kinds = {
        ast.Name: "id",
        ast.arg: "arg",
        ast.FunctionDef: "name",
        ast.ClassDef: "name",
        ast.Attribute: "attr",
    }
    return {getattr(node, kinds[type(node)]) for node in ast.walk(tree) if type(node) in kinds}


@pytest.mark.parametrize("name", TREES)
def test_imports_run_one_way(name: str):
    """script -> app -> method -> distributed; all of them -> weights -> models -> torch."""
    found = imports(TREES[name])
    above = []
    if name.startswith("models/"):
        above = ["hybridiff", "weights"]
    elif name.startswith("weights/"):
        above = ["hybridiff", "train_free_sample"]
    elif name.startswith("hybridiff/distributed/"):
        above = [
            "hybridiff.app",
            "hybridiff.denoise",
            "hybridiff.pipeline",
            "hybridiff.strategies",
            "hybridiff.session",
        ]
    elif not name.startswith(PROGRAM):
        above = ["hybridiff.app"]
    wrong = {module for module in found if module and module.startswith(tuple(above))} if above else set()
    assert not wrong


@pytest.mark.parametrize("name", TREES)
def test_what_only_the_program_does(name: str):
    """argparse, PIL, tqdm, print and the names of options; torch.distributed has a folder of its own."""
    found, tree = imports(TREES[name]), TREES[name]
    if not name.startswith("hybridiff/distributed/"):
        assert not {module for module in found if module and module.startswith("torch.distributed")}
    if name.startswith(PROGRAM):
        return
    assert not {module.split(".")[0] for module in found if module} & {"argparse", "PIL", "tqdm"}
    assert not any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))
    if name in METHOD:
        options = [text for text in strings(tree) if re.search(r"(?<![\w-])--[a-z]", text)]
        assert not options, f"{options}: the method names arguments in backquotes"


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("models/")])
def test_no_family_and_no_network_is_named_outside_models(name: str):
    families = {family.name for family in models.FAMILIES}
    assert not families & set(strings(TREES[name]))
    assert not NETWORKS & identifiers(TREES[name])


@pytest.mark.parametrize("name", TREES)
def test_words_are_those_of_the_field(name: str):
    """Private names that the project has left behind."""
    assert not PRIVATE & identifiers(TREES[name])


def test_tests_stand_without_the_benchmarks():
    """Those of the benchmarks themselves aside."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.parent.name != "benchmarks":
            assert not {
                name
                for name in imports(ast.parse(path.read_text()))
                if name and name.startswith("benchmarks")
            }


@pytest.mark.parametrize("name", TREES)
def test_files_can_be_read(name: str):
    assert len((ROOT / name).read_text().splitlines()) <= 450
