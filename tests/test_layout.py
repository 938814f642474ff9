"""The house: imports go only downwards, and each heavy library stays in its rooms."""

import ast
from collections.abc import Iterator

import pytest

# Lowest first; a module imports from its own room and those before it.
ROOMS = [
    "sections",
    "checks",
    "config",
    "planning",
    "sharding",
    "numerics",
    "model",
    "data",
    "hub",
    "training",
    "aot",
    "inference",
    "posttraining",
    "commands",
    "__main__",
]

FENCES = {  # library: the places that may import it, as prefixes of paths inside dsjax/
    "ml_collections": ("config.py",),
    "flax": ("model/",),
    "optax": ("training/optimizer.py", "training/step.py"),
    "orbax": ("training/checkpoint.py",),
    "tensorflow_datasets": ("data/",),
    "grain": ("data/",),
}
WITHOUT_JAX = (
    *("__init__.py", "sections.py", "checks.py", "config.py", "planning/", "commands/", "training/adoption.py"),
    *("hub/families.py", "hub/architecture.py", "hub/directory.py", "hub/safetensors.py"),
    *("posttraining/__init__.py", "posttraining/answers.py", "posttraining/tasks.py"),
    *("posttraining/rewards.py", "posttraining/worker.py"),
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, wherever the import stands, except those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from dsjax import x` names a room, `from dsjax.x import y` has named it already
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


@pytest.fixture
def modules(repository) -> dict[str, list[str]]:
    """Path inside dsjax/ to what the module imports."""
    root = repository / "dsjax"
    found = {
        path.relative_to(root).as_posix(): list(imports(ast.parse(path.read_text()))) for path in root.rglob("*.py")
    }
    assert {"config.py", "planning/counts.py", "__main__.py"} <= set(found)
    return found


def room(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")


def test_every_module_lives_in_a_room(modules):
    assert {room(path) for path in modules} - {"__init__"} <= set(ROOMS)


def test_imports_go_only_downwards(modules):
    seen = 0
    for path, names in modules.items():
        for name in names:
            package, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if package != "dsjax" or target not in ROOMS:
                continue
            seen += 1
            assert room(path) != "__init__", f"dsjax/{path} imports {name}; importing dsjax must stay cheap"
            assert ROOMS.index(target) <= ROOMS.index(room(path)), f"dsjax/{path} imports {name}, which lies above it"
    assert seen > 10


@pytest.mark.parametrize("library", FENCES)
def test_library_stays_behind_its_fence(modules, library):
    users = {path for path, names in modules.items() if any(name.partition(".")[0] == library for name in names)}
    assert users, f"nothing imports {library}"
    assert {path for path in users if not path.startswith(FENCES[library])} == set()


def test_configuration_and_planning_do_without_jax(modules):
    for path, names in modules.items():
        if path.startswith(WITHOUT_JAX):
            assert not {"jax", "flax", "jaxlib"} & {name.partition(".")[0] for name in names}, path


def test_there_is_no_drawer(repository):
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in repository.glob("dsjax/**/*.py") if path.stem in drawers] == []


def test_the_readme_names_every_module(repository):
    tree = (repository / "README.md").read_text().partition("```text\ndsjax/\n")[2].partition("```")[0]
    named = {line.split()[0] for line in tree.splitlines() if line.split()[0].endswith(".py")}
    assert named == {path.name for path in repository.glob("dsjax/**/*.py")} - {"__init__.py"}
