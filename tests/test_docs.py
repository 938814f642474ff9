"""What the documents show is what comes out."""

import re
import subprocess
import sys

from dsjax.__main__ import EXAMPLES, _parser
from dsjax.config import load


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_table_of_what_a_device_holds_is_what_its_program_prints(repository):
    text = (repository / "docs" / "pods.md").read_text()
    (program,) = blocks(text, "python")
    (printed,) = blocks(text, "text")
    ran = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed


def test_the_example_of_a_task_prints_what_it_shows(repository):
    text = (repository / "docs" / "posttraining.md").read_text()
    program, printed = blocks(text, "python")[0], blocks(text, "text")[0]
    ran = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed


def test_every_flag_has_a_row_that_names_its_commands(repository):
    text = (repository / "docs" / "reference.md").read_text()
    table = text[text.index("| flag | of | meaning |") :].partition("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in table.splitlines()[2:]]
    for name, command in _parser()[1].items():
        for flag in {flag for action in command._actions for flag in action.option_strings} - {"-h", "--help"}:
            named = [of for flags, of in rows if re.search(rf"{re.escape(flag)}(?![\w.-])", flags)]
            of = " ".join(named).replace("as `--config`", name)
            assert re.search(rf"\b{name}\b", of), f"reference.md: no row of {flag} names {name}"


def test_examples_of_the_help_are_those_of_the_readme(repository):
    shown = " ".join((repository / "README.md").read_text().split())
    found = [line.strip() for line in EXAMPLES.splitlines() if "configs/r1_tiny.py" in line]
    assert len(found) == 2
    for line in found:
        assert line in shown
    begun, goes_on = (line.rpartition("--workdir ")[2] for line in found)
    assert load(str(repository / "configs" / "r1_tiny.py") + ":rl").init_from == begun != goes_on


def test_documents_name_files_and_headings_that_exist(repository):
    heading = re.compile(r"^#+ (.*)$", re.MULTILINE)

    def anchors(text: str) -> set[str]:
        return {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in heading.findall(text)}

    documents = [repository / "README.md", *(repository / "docs").glob("*.md")]
    links = 0
    for document in documents:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            links += 1
            name, _, anchor = target.partition("#")
            file = (document.parent / name).resolve() if name else document
            assert file.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{document.name}: {target}"
    assert links > 20
