"""The README is true: every command in it runs, every flag is explained, and the modules import as the file list says."""
import ast
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import ROOT, make_data, run
from layouts import defect_spectrum

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
            if line.startswith(("python ", "torchrun "))]
ORDER = ["inspect_rules", "datasets", "metrics", "unet", "diffusion", "defect_gen", "segment", "benchmark", "report", "simulation", "train", "sample", "evaluate"]
# what a command is given at the end so that it takes seconds; the last of a repeated flag wins
SHORT = {"train.py": "--preset tiny --size 16 16 --steps 2 --batch-size 2 --save-every 2", "sample.py": "--count 2 --num-steps 2",
         "evaluate.py": "--quick", "simulation.py": "--count 2", "docs/claim.py": "--quick", "segment.py": "--size 32 32 --steps 2 --batch-size 2",
         "benchmark.py": "--quick"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the program with the user's folders that the README names."""
    place = tmp_path_factory.mktemp("readme")
    for name in ORDER:
        shutil.copy(ROOT / f"{name}.py", place)
    shutil.copytree(ROOT / "docs", place / "docs")
    shutil.copytree(ROOT / "data", place / "data")
    make_data(place / "FOLDER")
    defect_spectrum(place / "Defect_Spectrum")
    return place


def follow(commands, place):
    """Run commands one after the other; the failures as text."""
    failures = []
    for command in commands:
        program, *words = shlex.split(command)
        launcher = []
        if program == "torchrun":
            launcher, words = ["-m", "torch.distributed.run", "--standalone", *words[:words.index("--") + 1]], words[words.index("--") + 1:]
        script, *flags = words
        result = run(place / script, *flags, *shlex.split(SHORT.get(script, "")), cwd=place, launcher=launcher)
        # 1: something was rejected; 2: a generator of two steps drew nothing that was wished for
        allowed = (0, 1) if script == "inspect_rules.py" else (0, 2) if "--kind" in flags else (0,)
        if result.returncode not in allowed or "Traceback" in result.stderr:
            failures.append(f"{command}\n{result.stdout[-800:]}{result.stderr[-800:]}")
    return failures


def test_readme_commands_run(workplace):
    assert len(COMMANDS) > 20
    chain = [c for c in COMMANDS if re.search(r"(train|sample|evaluate|inspect_rules)\.py", c)]      # each needs what came before
    with ThreadPoolExecutor(2) as pool:
        failures = pool.map(follow, (chain, [c for c in COMMANDS if c not in chain]), (workplace, workplace))
    assert not [text for texts in failures for text in texts]


@pytest.mark.parametrize("name", ORDER)
def test_help_explains_every_flag(name):
    import contextlib
    import importlib
    import io
    module, text = importlib.import_module(name), io.StringIO()
    old, sys.argv = sys.argv, [f"{name}.py", "--help"]
    try:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
            module.parse_args(["--help"]) if hasattr(module, "parse_args") else module.main()
    finally:
        sys.argv = old
    assert stop.value.code == 0
    source = (ROOT / f"{name}.py").read_text()
    flags = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    for call in flags:
        keywords = {k.arg for k in call.keywords}
        assert "help" in keywords, f"{name}.py line {call.lineno}: a flag without help"
        assert call.args[0].value in text.getvalue() or not call.args[0].value.startswith("-")


def test_imports_point_upward_only():
    for place, name in enumerate(ORDER):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {
            n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        ours = imported & set(ORDER)
        assert ours <= set(ORDER[:place]) - ({"train", "sample"} if name != "train" else {"sample"}), f"{name} imports {ours}"
        foreign = {i.split(".")[0] for i in imported} - set(ORDER) - {"data"} - set(sys.stdlib_module_names)
        peers = {"segmentation_models_pytorch", "transformers"} if name == "benchmark" else set()               # timed where installed
        assert foreign <= {"torch", "torchvision", "numpy", "PIL", "tqdm"} | peers, f"{name} imports {foreign}"
    assert "torch" not in (ROOT / "inspect_rules.py").read_text().split("Needs numpy")[1].split("import")[1]
