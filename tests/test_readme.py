"""README and docs are true: every command in them runs, every flag is explained, imports point one way."""
import ast
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from commands import Commands
from conftest import ROOT, make_data, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line.split("#")[0].strip() for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S) for line in block.splitlines()
    if line.startswith(("python ", "torchrun "))
]
ORDER = [
    "inspect_rules", "data.drawn", "datasets", "unet", "diffusion", "defect_gen", "segment", "train",
    "evaluate", "sample"
]
FILES = [f"{name.replace('.', '/')}.py" for name in ORDER] + ["data/convert.py"] + [
    f"experiments/{path.name}" for path in sorted((ROOT / "experiments").glob("*.py"))]
# what a command is given at the end so that it takes seconds; the last of a repeated flag wins
SHORT = {
    "train.py": "--preset tiny --size 16 16 --steps 2 --batch-size 2 --save-every 2",
    "evaluate.py": "--quick", "sample.py": "--count 2 --num-steps 2",
    "segment.py": "--size 32 32 --steps 2 --batch-size 2"
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the program with the user's folders that the pages name."""
    place = tmp_path_factory.mktemp("readme")
    for name in FILES + ["docs/magnetic_tile.json"]:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    make_data(place / "FOLDER")
    for name in ("pill", "bolt"):
        make_data(place / "Defect_Spectrum/DS-MVTec" / name, count=6)
    for part in ("train", "test"):                                  # a download in the layout of KolektorSDD2
        (place / "DOWNLOAD" / part).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(place / f"DOWNLOAD/{part}/{n}.png")
            Image.fromarray(np.full((8, 8), 255 * n, np.uint8)).save(place / f"DOWNLOAD/{part}/{n}_GT.png")
    return place


def test_every_command_of_the_pages_runs(workplace):
    assert len(COMMANDS) > 20
    commands, failures = Commands(workplace, ["torch", "torchvision", "numpy", "PIL", "tqdm"]), []
    for line in dict.fromkeys(COMMANDS):
        program, *words = shlex.split(line)
        script = words[1] if words[0] == "-m" else next(word for word in words if word.endswith(".py"))
        words += shlex.split("--quick" if script.startswith("experiments.") else SHORT.get(script, ""))
        if program == "torchrun":
            result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
                                    cwd=workplace, capture_output=True, text=True, timeout=120)
            status, output = result.returncode, result.stdout + result.stderr
        else:
            status, output = commands.run(*words)
        # something was rejected, or two steps of training drew nothing that was asked for
        may_fail = script == "inspect_rules.py" or "--defect" in words or "--photos" in words
        if status not in ((0, 1) if may_fail else (0,)) or "Traceback" in output:
            failures.append(f"{line}\n{output[-6000:]}")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("name", FILES)
def test_help_explains_every_flag(name):
    tree = ast.parse((ROOT / name).read_text())
    flags = [
        call for call in ast.walk(tree) if isinstance(call, ast.Call) and (
            getattr(call.func, "attr", "") == "add_argument" or getattr(call.func, "id", "") == "add")
        and call.args and isinstance(call.args[0], ast.Constant) and str(call.args[0].value).startswith("--")
    ]
    for call in flags:
        assert "help" in {keyword.arg
                          for keyword in call.keywords}, f"{name}:{call.lineno}: a flag without help"


LATE = {"inspect_rules": {"datasets"}}      # imported by one branch of a command: --data


def imports(path):
    """Names of the modules that a file imports, at its top and, but for LATE, in functions."""
    tree = ast.parse(path.read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    late = (found - top) & LATE.get(path.stem, set())
    return found - late | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_imports_point_upward_only_and_few_packages_are_needed():
    for name in FILES:
        module, found = name.removesuffix(".py").replace("/", "."), imports(ROOT / name)
        ours = {other for other in found if other.split(".")[0] in {"data", "experiments", *ORDER}}
        if module in ORDER:
            allowed = set(ORDER[:ORDER.index(module)]) - ({"train", "sample"}
                                                          if module in ("sample", "evaluate") else set())
        else:
            below = {other for other in ours if other.startswith("experiments")}
            allowed = set(ORDER) | below if module.startswith("experiments") else set()
        assert ours <= allowed, f"{name} imports {ours - allowed}"
        foreign = {other.split(".")[0] for other in found - ours} - set(sys.stdlib_module_names)
        peers = {"segmentation_models_pytorch", "transformers"
                 } if name == "experiments/speed.py" else set()  # timed where installed
        assert foreign <= {"torch", "torchvision", "numpy", "PIL", "tqdm"
                           } | peers, f"{name} imports {foreign}"
        if module in ("inspect_rules", "data.drawn", "data.convert"):
            assert foreign <= {"numpy", "PIL"}, f"{name} is to be read alone"


@pytest.mark.parametrize("module, left_out", [("train", "torchvision"), ("inspect_rules", "torch")])
def test_what_a_module_does_without_is_not_loaded(module, left_out):
    code = f"import sys, {module}; sys.exit('{left_out}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_errors_reach_the_user_as_one_sentence(tmp_path):
    result = run("train.py", "--stage", "large", "--data", "nowhere", "--out", tmp_path)
    assert result.returncode == 1 and "no such folder" in result.stderr and "Traceback" not in result.stderr
