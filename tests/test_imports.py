"""Three layers whose imports only go down, and commands that start without torch."""

import ast
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SAMPLES, run_in_process, run_process

PACKAGE = ROOT / "sftcli"
COMMON = {"common", "prompts", "training_job", "resuming", "divergence", "samples", "finishing"}  # of several stages
MODULES = sorted(PACKAGE.rglob("*.py"))
# a module of our own may import these groups; "model" and "text" never meet
MAY_IMPORT = {
    "cli": {"basis", "stages", "sftcli", "cli"},
    "stages": {"basis", "text", "model", "common", "sftcli"},
    "text": {"basis", "text"},
    "model": {"basis", "model"},
    "basis": {"basis"},
}
LEVELS = [
    "errors",
    "hub",
    "lines",
    "reading",
    "writing",
    "artifacts",
    "manifest",
    "rows",
    "tensorheader",
    "rowfile",
    "indexedfile",
    "console",
    "fieldtypes",
    "recipe",
    "recipefile",
    "views",
]


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def group_of(name):
    """basis, text, model, stages, common, cli or sftcli of a dotted name."""
    parts = name.split(".")
    if len(parts) == 1:
        return "sftcli"
    if parts[1] == "stages":
        return "common" if parts[2:3] and parts[2] in COMMON else "stages"
    if parts[1] in ("cli", "exits", "flags", "tools", "__main__"):
        return "cli"
    return parts[1] if parts[1] in ("text", "model") else "basis"


def imports_of(path):
    """Dotted names of our own modules that a file imports, anywhere in it."""
    known = {name_of(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "sftcli")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_go_down(path):
    own = name_of(path)
    group = group_of(own)
    for name in imports_of(path):
        if group == "cli" and own.endswith("__main__"):
            assert name == "sftcli.cli"
        elif group == "stages" and own == "sftcli.stages.run":
            assert group_of(name) in MAY_IMPORT["stages"] | {"stages"}, name
        else:
            assert group_of(name) in MAY_IMPORT["stages" if group == "common" else group], f"{own} imports {name}"


def test_text_and_model_never_meet():
    for path in MODULES:
        group = group_of(name_of(path))
        if group in ("text", "model"):
            assert {group_of(name) for name in imports_of(path)} <= {group, "basis"}


def test_only_run_chains_stages():
    chained = {
        name_of(path)
        for path in MODULES
        for name in imports_of(path)
        if group_of(name_of(path)) in ("stages", "common") and group_of(name) == "stages"
    }
    assert chained == {"sftcli.stages.run"}


def test_the_modules_at_the_bottom_have_an_order():
    """reading knows errors, rows knows reading, ...: never the other way."""
    for path in MODULES:
        own = name_of(path).removeprefix("sftcli.")
        if own in LEVELS:
            for name in imports_of(path):
                below = name.removeprefix("sftcli.")
                assert below == "sftcli" or LEVELS.index(below) < LEVELS.index(own), f"{own} imports {below}"


def test_no_module_imports_an_oracle():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            found = {name.split(".")[0] for name in names} & {"transformers", "peft", "gguf", "datasets"}
            assert found <= ({"gguf"} if name_of(path) == "sftcli.model.gguf.file" else set()), path  # an extra


HEAVY = ("torch", "numpy", "transformers", "safetensors")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")
PROBE = """
import io, sys
sys.argv = ["sft", *sys.argv[1:]]
from sftcli.cli import app
try:
    app()
except SystemExit as stop:
    assert not stop.code, stop.code
found = [name for name in {heavy!r} if name in sys.modules]
print("loaded:", *found, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A base, tokens and rows made by the stages themselves, each in a process that tells what it loaded."""
    folder = tmp_path_factory.mktemp("light")
    data = folder / "qa.jsonl"
    data.write_bytes(b"".join((SAMPLES / "qa.jsonl").read_bytes().splitlines(keepends=True)[:40]))
    columns = ("--columns", "prompt=question,completion=answer")
    commands = {
        "help": ("--help",),
        "tokenize --help": ("tokenize", "--help"),
        "init": ("init", data, "-o", folder / "base", "--vocab-size", 300, *columns),
        "tokenize": ("tokenize", data, "-m", folder / "base", "-o", folder / "tokens.jsonl", *columns),
        "mask": ("mask", folder / "tokens.jsonl", "--show", 1, "-o", folder / "rows.safetensors"),
        "show rows": ("show", folder / "rows.safetensors"),
        "show tokens": ("show", folder / "tokens.jsonl"),
        "show folder": ("show", folder / "base"),
        "check": ("check", data, "-m", folder / "base", *columns),
        "train": (
            "train", folder / "rows.safetensors", "-m", folder / "base", "-o", folder / "run", "--max-steps", 1,
            "--set", "batch_tokens=500", "--set", "sample_rows=1", "--set", "sample_tokens=2",
        ),
    }  # fmt: skip
    loaded = {}
    for name, command in commands.items():
        program = PROBE.format(heavy=COMPILER if name == "train" else HEAVY)
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)], capture_output=True, cwd=ROOT, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
        loaded[name] = done.stderr.decode().splitlines()[-1]
    return loaded


@pytest.mark.parametrize(
    "name", ["help", "tokenize --help", "init", "tokenize", "mask", "show rows", "show tokens", "show folder", "check"]
)
def test_commands_without_a_model_never_load_torch(pipeline, name):
    assert pipeline[name] == "loaded:"


def test_a_training_never_loads_the_compiler_of_torch(pipeline):
    assert pipeline["train"] == "loaded:"


def test_help_is_there_in_a_moment():
    """Half a second on a quiet machine; the best of three, with room for a busy one."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        result = run_process("--help", cwd=ROOT)
        times.append(time.monotonic() - start)
        assert result.code == 0 and b"Supervised fine-tuning" in result.out
    assert min(times) < 1.0


def test_every_command_has_help_and_an_example():
    commands = [
        "init",
        "tokenize",
        "mask",
        "train",
        "merge",
        "generate",
        "evaluate",
        "show",
        "check",
        "checkpoints",
        "import",
        "export",
        "run",
    ]
    for command in commands:
        result = run_in_process(command, "--help")
        assert result.code == 0 and f"sft {command} ".encode() in result.out, command
    assert run_in_process("--version").out.startswith(b"sft ")
