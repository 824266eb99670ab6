"""The public surface: sorted, documented, with an example each; imports point one way."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import gdtrain

PACKAGE = Path(gdtrain.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
MATHEMATICS = [f"gdtrain.{n}" for n in ("rules", "schedules", "losses", "objective")]
SHOWN = re.compile(r"^from (gdtrain[\w.]*) import ([\w, ]+)$", re.MULTILINE)
MODULES = ["gdtrain", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "gdtrain."))]


def documented():
    """The names that a package or a file of the mathematics exports, or that the docs show."""
    for name in MODULES:
        module = importlib.import_module(name)
        if name != "gdtrain.cli" and (hasattr(module, "__path__") or name in MATHEMATICS):
            yield from ((name, entry) for entry in module.__all__)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name, entries in SHOWN.findall(page.read_text("utf-8")):
            yield from ((name, entry.strip()) for entry in entries.split(","))


def is_ours(item):
    """Neither a type alias nor a module."""
    return str(getattr(item, "__module__", "")).startswith("gdtrain")


def test_all_is_sorted_and_each_name_has_a_docstring():
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, name
        shown = list(module.__all__)
        assert shown == sorted(shown, key=lambda n: (not n.isupper(), not n[0].isupper(), n)), name
        for entry in shown:
            item = getattr(module, entry)
            assert item.__doc__ or not is_ours(item), f"{name}.{entry}"


def test_a_public_name_has_an_example():
    for name, entry in sorted(set(documented())):
        item = getattr(importlib.import_module(name), entry)
        assert not is_ours(item) or ">>>" in item.__doc__, f"{name}.{entry}"


def test_descent_and_analyses_import_no_lightning():
    code = (
        "import sys; [__import__(name) for name in sys.argv[1:]]; print('lightning' in sys.modules)"
    )
    names = [name for name in MODULES if name.startswith(("gdtrain.analysis.", "gdtrain.descent."))]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


LAYERS = [
    ["errors", "generators", "ranges", "_compat"],
    ["rules", "schedules", "losses", "penalised"],
    ["step_sizes", "models"],
    ["objective", "optim"],
    ["data.order"],
    ["descent.plan"],  # stands on the order alone
    ["data"],
    ["engines"],
    ["descent"],
    ["convex"],
    ["reporting"],
    ["analysis"],
    ["lightning"],
    ["callbacks"],
    ["runs"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def level(path):
    """Of a module, or of the folder that it stands in."""
    return LEVEL.get(".".join(path[:2]), LEVEL[path[0]])


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


HEAVY = ("lightning", "hydra", "omegaconf", "sklearn", "tensorboard")
TORCH_ALONE = ("rules", "schedules", "losses", "objective", "optim", "models", "engines")


def test_imports_point_up_the_map_only():
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        own = here[0]
        for name in () if own == "__init__" else imports(path):
            said = f"{path.relative_to(PACKAGE)} imports {name}"
            top, _, rest = name.partition(".")
            if top == "gdtrain" and rest:
                other = rest.split(".")
                assert other[0] == own or level(other) < level(here), said
            if own in TORCH_ALONE:
                assert top not in HEAVY, said
            if own in ("analysis", "convex", "descent"):
                assert top != "lightning", said
            if own not in ("_compat", "runs", "cli"):
                assert top not in ("hydra", "omegaconf"), said
