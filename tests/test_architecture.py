"""The shape of the package: short rooms, and nobody reaches into another module's objects."""

import ast
from pathlib import Path

import pytest

import gdtrain

PACKAGE = Path(gdtrain.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CLASS, FILE = 350, 600  # lines
PUBLIC = ("_replace", "_fields", "_asdict", "_exit")  # of named tuples and of os, as documented


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def own_names(module):
    """Private names that a module gives to its classes, objects and itself."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


def reached_into(module):
    own = set(own_names(module))
    for node in ast.walk(module):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        if node.attr.endswith("_") or node.attr in own or node.attr in PUBLIC:
            continue  # "_target_" is a key of Hydra's
        holder = node.value
        if isinstance(holder, ast.Name) and holder.id in ("self", "cls"):
            continue
        yield f"{ast.unparse(node)} in line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_attributes_are_their_own_modules(path):
    if path.parent.name != "_compat":
        assert not list(reached_into(tree(path)))


def test_what_reaches_into_another_object_is_found():
    module = ast.parse("class A:\n    def f(self, b):\n        self._x = b._y\n        b._x = 1")
    assert list(reached_into(module)) == ["b._y in line 3"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= CLASS, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_states_of_generators_are_one_modules(path):
    names = {"get_rng_state", "set_rng_state", "getstate", "setstate", "get_state", "set_state"}
    used = {n.attr for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)} & names
    assert not used or path == PACKAGE / "generators.py"
