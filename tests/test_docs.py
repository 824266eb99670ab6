"""What the README and the pages in docs/ show is run as it stands; demonstrations have tests."""

import re
from pathlib import Path

import pytest
from commands import command

from gdtrain.cli.composition import compose
from gdtrain.cli.words import jobs, read_flags
from gdtrain.runs.configuration import checked

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# Pages whose examples are whole; those of other pages are run by the tests of their subject.
WHOLE = (
    "README", "convergence", "drop-in", "edge-of-stability", "keeping", "learning-rate",
    "lightning", "python",
)  # fmt: skip


def blocks(*languages):
    return [
        (page.stem, code)
        for page in PAGES
        for language, code in BLOCKS.findall(page.read_text("utf-8"))
        if language in languages
    ]


EXAMPLES = [code for page, code in blocks("python") if page in WHOLE]
COMMANDS = sorted({
    line.split("  #")[0].strip() for _, code in blocks("", "bash") for line in code.splitlines()
})  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_each_python_example_runs(tmp_path, monkeypatch):
    assert len(EXAMPLES) == 13
    monkeypatch.chdir(tmp_path)
    exec(compile("\n\n".join(EXAMPLES), "docs", "exec"), {})
    assert {"curve.png", "find_lr.png", "wine.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_the_two_commands_of_a_fresh_machine_are_there():
    text = README.read_text("utf-8")
    assert "pip install -e . && python scripts/train.py optimizer=sgd" in text
    assert "pip install -e '.[test]' && pytest" in text
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if c.startswith("python scripts/train.py") and "…" not in c]
)
def test_each_command_composes(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()
    for overrides in jobs(read_flags(line.split()[2:])[0]):
        checked(compose(overrides, None))


def test_the_message_that_is_shown_is_the_message_that_comes(tmp_path):
    ((_, session),) = [found for found in blocks("console") if found[0] == "README"]
    line, message = session.strip().split("\n", 1)
    done = command(tmp_path, "train", *line.split()[3:])
    assert done.returncode == 2
    assert done.stderr.strip() == message


def test_every_file_of_the_map_is_there_and_every_package_is_on_it():
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    shown = re.findall(r"^((?:gdtrain|conf|scripts)/\S*)", text, re.MULTILINE)
    for name in shown:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    for package in (ROOT / "gdtrain").glob("*/__init__.py"):
        name = f"gdtrain/{package.parent.name}"
        assert name in {entry.rstrip("/") for entry in shown}, name


def test_every_choice_is_listed():
    text = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 11
    for group, shown in rows:
        if group == "experiment":
            continue
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in shown, f"{group}={path.stem}"


def test_each_picture_and_page_that_is_linked_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
