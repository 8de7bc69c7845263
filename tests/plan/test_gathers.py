"""The counting itself is compared with real ranks in `test_ranks`."""

from __future__ import annotations

import subprocess
import sys


def test_one_process_and_a_plan_wait_for_no_library_of_many() -> None:
    imports = "import sys, sleeptrain.train.trainer, sleeptrain.plan.layout"
    code = f"{imports}; sys.exit(bool({{'megatron', 'deepspeed'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
