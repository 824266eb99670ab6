"""What the pages in docs/ show is run as it stands; demonstrations have tests of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# Pages whose examples are whole.
WHOLE = ("learning-rate", "convergence", "edge-of-stability", "drop-in", "keeping")
EXAMPLES = [
    pytest.param(code, id=f"{name}-{k}")
    for name in WHOLE
    for k, code in enumerate(
        code
        for language, code in BLOCKS.findall((ROOT / "docs" / f"{name}.md").read_text("utf-8"))
        if language == "python"
    )
]
COMMANDS = sorted(
    {
        line.split("  #")[0].strip()
        for page in PAGES
        for language, code in BLOCKS.findall(page.read_text("utf-8"))
        if language in ("", "bash")
        for line in code.splitlines()
        if line.startswith("python scripts/train.py") and "…" not in line
    }
)


@pytest.mark.slow
def test_each_python_example_runs(tmp_path):
    assert len(EXAMPLES) == 6
    code = "\n\n".join(param.values[0] for param in EXAMPLES)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "find_lr.png").is_file()


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_composes(line, tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from gdtrain.cli.composition import compose
    from gdtrain.cli.overrides import flags, jobs
    from gdtrain.runs.configuration import check

    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()
    for overrides in jobs(flags(line.split()[2:])[0]):
        check(OmegaConf.to_container(compose(overrides, None), resolve=True))


def test_each_picture_and_page_that_is_linked_is_there():
    for page in (*PAGES, ROOT / "README.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
