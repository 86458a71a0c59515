import ast
import subprocess
import sys
from pathlib import Path

import pytest

import feature_store

SCRIPT = """
import sys, typeguard
from pathlib import Path
checked = typeguard.typechecked
from feature_store.definitions import open_store
open_store(Path(sys.argv[1]))
print("torch" in sys.modules, typeguard.typechecked is checked)
from feast.torch_wrapper import get_torch
print(get_torch().__name__)
"""


def test_a_process_that_reads_features_carries_no_torch(tmp_path: Path):
    """Though torch is installed here; who asks Feast for tensors would still get it, and typeguard is as it was."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["False True", "torch"]


MODULES = [
    file for file in Path(feature_store.__file__).parent.glob("*.py") if file.stem not in {"light", "newest_redis"}
]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_feast_is_imported_here_first_wherever_it_is_used(file: Path):
    """Whoever comes first decides how: so each function says `import_feast()` before it takes anything from Feast."""
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef):
            taken = [
                node.lineno
                for node in ast.walk(function)
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "feast"
            ]
            called = [
                node.lineno
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_feast"
            ]
            assert not taken or (called and min(called) < min(taken)), function.name
