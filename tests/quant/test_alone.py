import subprocess
import sys


def test_the_heart_imports_torch_alone() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import qat_runner.quant
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - {"qat_runner", "torch"} - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
