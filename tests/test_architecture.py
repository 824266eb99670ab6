"""The shape of the package: short rooms, and nobody reaches into another module's objects."""

import ast
from pathlib import Path

import gdtrain

PACKAGE = Path(gdtrain.__file__).parent
TREES = {
    path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
CLASS, FILE = 350, 600  # lines
PUBLIC = ("_replace", "_fields", "_asdict", "_exit")  # of named tuples and of os, as documented


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


def test_private_attributes_are_their_own_modules():
    ours = {path: tree for path, tree in TREES.items() if path.parts[0] != "_compat"}
    assert not [f"{path}: {found}" for path, tree in ours.items() for found in reached_into(tree)]


def test_what_reaches_into_another_object_is_found():
    module = ast.parse("class A:\n    def f(self, b):\n        self._x = b._y\n        b._x = 1")
    assert list(reached_into(module)) == ["b._y in line 3"]


def test_rooms_are_short():
    for path, tree in TREES.items():
        assert len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= FILE, path
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno + 1 <= CLASS, f"{path}: {node.name}"


def test_the_states_of_generators_are_one_modules():
    names = {"get_rng_state", "set_rng_state", "getstate", "setstate", "get_state", "set_state"}
    using = [
        str(path)
        for path, tree in TREES.items()
        if names & {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    ]
    assert using == ["generators.py"]
