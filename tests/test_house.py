"""What every file keeps to, so that two can be read side by side."""
import ast
import subprocess

from conftest import ROOT


def test_lines_have_at_most_110_characters_and_functions_at_most_95_lines():
    listing = subprocess.run(["git", "ls-files", "*.py", "README.md", "docs/*.md"], cwd=ROOT, text=True,
                             capture_output=True).stdout.split()                # empty where this is no clone
    found = []
    for name in listing:
        text = (ROOT / name).read_text() if (ROOT / name).exists() else ""      # deleted, not yet committed
        wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 110]
        found += [f"{name}:{n}: a wide line" for n in wide]
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 95:
                found.append(f"{name}:{node.lineno}: {node.name} is too long")
    assert not found, "\n".join(found)
