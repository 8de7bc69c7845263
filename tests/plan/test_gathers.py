"""`test_ranks` compares the counts themselves with real ranks."""

from __future__ import annotations

import subprocess
import sys


def test_one_process_and_a_plan_import_no_distributed_library() -> None:
    imports = "import sys, sleeptrain.train.trainer, sleeptrain.plan.layout"
    code = f"{imports}; sys.exit(bool({{'megatron', 'deepspeed'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
