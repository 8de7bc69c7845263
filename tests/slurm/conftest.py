from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import Cluster, why_not

from sleeptrain.train import trainer
from tests.parallel.processes import run_ranks
from tests.slurm.jobs import NODES, Jobs, configuration

# Set where these tests must run: a reason not to run is then a failure.
REQUIRED = "SLEEPTRAIN_SLURM_TESTS"


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if reason := why_not():
        if os.environ.get(REQUIRED):
            pytest.fail(f"no Slurm cluster here: {reason}")
        pytest.skip(f"no Slurm cluster here: {reason}")
    # Not pytest's folder, which others may not enter: munge refuses it.
    folder = Path(tempfile.mkdtemp(prefix="sleeptrain-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start(NODES)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes; after the test its jobs are removed."""
    yield running_cluster
    running_cluster.mend()


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reference run: four processes, without Slurm."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("megatron.core")
        pytest.importorskip("deepspeed")
        assert run_ranks(trainer.train, 4, configuration(root), timeout=400) == [0] * 4
    return root / "r"
