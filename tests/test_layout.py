"""Who may import whom. A file is read with the files that it imports: few of them, and all from lower floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "minitrain"

# A file imports from lower floors only; a file of models/ also from models/layers, which is on its own floor.
# On the right column's floor, zero.py stands on others, these on ddp.py, and what cuts a model on cut.py.
# The two columns do not know each other: models, losses and optimizers are plain, parallel/ wraps them.
FLOORS = [
    {"boxes", "config", "kernels"},
    {"deterministic", "extension", "joined", "parallel.comm", "parallel.layout", "parallel.recompute", "signals",
     "storage"},
    {"add_norm", "fused_attention", "masters", "norm_rotate", "routed_rows", "swiglu", "shards", "batch",
     "parallel.mesh", "parallel.window", "pieces"},
    {"attention", "multi_tensor"},
    {"qkv_attention"},
    {
        "left": {"models", "models.layers", "models.llama", "models.qwen3", "models.qwen3_moe",
                 "loss", "optim", "data", "chat", "metrics"},
        "right": {"parallel.cp", "parallel.cut", "parallel.ddp", "parallel.deferred", "parallel.ep", "parallel.gather",
                  "parallel.offload", "parallel.owners", "parallel.pp", "parallel.tp", "parallel.zero"},
    },
    {"checkpoint", "hf", "parallel"},
    {"validate", "generate", "plan"},
    {"train"},
    {"prove"},
    {"__main__"},
]  # fmt: skip
COLUMNS = 5  # the floor of two columns
LEFT, RIGHT = FLOORS[COLUMNS].values()
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in (LEFT | RIGHT if i == COLUMNS else floor)}

BENEATH = {
    "parallel.deferred": {"parallel.ddp"},
    "parallel.gather": {"parallel.ddp"},
    "parallel.offload": {"parallel.ddp"},
    "parallel.owners": {"parallel.ddp"},
    "parallel.ep": {"parallel.cut"},
    "parallel.pp": {"parallel.ddp", "parallel.deferred"},
    "parallel.tp": {"parallel.cut"},
    "parallel.zero": {"parallel.ddp", "parallel.gather", "parallel.offload", "parallel.owners"},
}

# The only imports of a higher floor; they stand in a function, so that reading the file does not need the other.
UPWARD = {("models.layers", "hf")}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
    for path in sorted(ROOT.rglob("*.py"))
}
PACKAGE = SOURCES.pop("__init__")
NOT_A_FILE = {"kernels"}  # the compiled module


def imports(source, known=FLOOR):
    """-> [(module of minitrain, whether the import stands in a function), ...]"""
    found = []

    def visit(node, deferred):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            if name == "minitrain" or name.startswith("minitrain."):
                name = name.removeprefix("minitrain").removeprefix(".")
                found.append((name if name in known else name.rpartition(".")[0], deferred))
        for child in ast.iter_child_nodes(node):
            visit(child, deferred or isinstance(node, ast.FunctionDef | ast.Lambda))

    visit(ast.parse(source), False)
    return found


def violations(sources):
    bad = []
    for name, source in sources.items():
        for other, deferred in imports(source):
            same_package = name.startswith("models.") and other == "models.layers"
            same_package |= other in BENEATH.get(name, ())
            if (name, other) in UPWARD and deferred:
                continue
            if other not in FLOOR or not (FLOOR[other] < FLOOR[name] or same_package):
                bad.append(f"{name} (floor {FLOOR[name]}) imports {other or 'minitrain'} (floor {FLOOR.get(other)})")
    return bad


def closure(name):
    """The files that importing one needs, itself too. The __init__ files of minitrain and minitrain.models run as
    well, but are not counted: nobody has to read them for a model (test_packages_are_lazy)."""
    seen, todo = set(), {name}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= {other for other, deferred in imports(SOURCES[name]) if not deferred} - seen - NOT_A_FILE
    return seen


def test_every_file_has_its_floor():
    assert set(SOURCES) == set(FLOOR) - NOT_A_FILE


def test_files_import_only_lower_floors():
    assert violations(SOURCES) == []


@pytest.mark.parametrize(
    "name, line",
    [
        ("batch", "from minitrain.train import train"),
        ("config", "import minitrain.storage"),
        ("models.qwen3", "from minitrain import hf"),  # only models.layers may, and only in a function
        ("models.layers", "from minitrain.hf import from_pretrained"),
        ("models.layers", "def f():\n    from minitrain import train"),
        ("models.qwen3", "from minitrain.models.llama import LlamaConfig"),  # an architecture stands on its own
        ("loss", "from minitrain.parallel.zero import ShardedOptimizer"),  # across its columns ...
        ("parallel.zero", "try:\n    from minitrain import loss\nexcept ImportError: pass"),  # ... in both directions
        ("checkpoint", "if True:\n    from minitrain.parallel import parallelize"),  # its own floor
        ("attention", "from minitrain import attention"),
        ("data", "from minitrain import Batch"),  # the public names are for users
        ("data", "def f():\n    import minitrain.train as t"),
    ],
)
def test_a_planted_violation_is_found(name, line):
    assert len(violations(SOURCES | {name: SOURCES[name] + "\n" + line + "\n"})) == 1


def test_upward_imports_are_there():
    """The list of exceptions does not outlive them."""
    for name, other in UPWARD:
        assert (other, True) in imports(SOURCES[name])


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.startswith("models.")))
def test_a_model_is_read_in_four_files(name):
    assert len(closure(name)) <= 4, sorted(closure(name))


def test_closure_follows_imports():
    assert closure("models.qwen3") == {"models.qwen3", "models.layers", "batch"}
    assert {"checkpoint", "storage", "config", "models.layers"} <= closure("train")


def test_packages_are_lazy():
    for source in (PACKAGE, SOURCES["models"]):
        assert {other for other, deferred in imports(source) if not deferred} <= FLOORS[0]


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.split(".")[0] == "models"))
def test_models_do_not_know_of_processes(name):
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "distributed" not in ast.unparse(node)
        assert not (isinstance(node, ast.Attribute) and node.attr == "distributed")


def test_importing_minitrain_imports_nothing_heavy():
    check = "import sys, minitrain; print(sorted({'torch', 'tyro', 'tokenizers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", check], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_help_does_not_wait_for_the_compiler():
    """torch._dynamo, nearly half of the time that a process with it takes to start."""
    check = "import sys, minitrain.__main__; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", check], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert out.stdout == "True False\n"


def test_no_file_is_longer_than_an_evening_allows():
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert max(lengths.values()) <= 450, lengths
