"""What the documents show is what comes out."""

import re
import subprocess
import sys


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
