"""How often a run has been taken back to a checkpoint, and whether that helps."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.schema import HealthConfig


@dataclass
class Rollbacks:
    """What a run knows of its rollbacks, in its checkpoints too.

    total: of the run. undone: steps that were made and taken back. base: the step that was gone back to last. furthest:
    the last step that went wrong. in_vain: rollbacks since a step behind `furthest` was made.
    """

    total: int = 0
    undone: int = 0
    base: int = 0
    furthest: int = 0
    in_vain: int = 0

    def made(self, step: int) -> None:
        """A step has gone well."""
        if step > self.furthest:
            self.in_vain = 0

    def good_until(self, bad_step: int, distance: int) -> int:
        """The newest step whose checkpoint is taken for good when `bad_step` goes wrong.

        It lies `distance` steps before: what was wrong may have begun before it showed. A step that was gone back to
        stays good, since the steps behind it are others now.
        """
        return max(bad_step - distance, self.base)

    def taken_back(self, bad_step: int, to_step: int) -> None:
        self.total += 1
        self.in_vain += 1
        self.undone += bad_step - 1 - to_step
        self.base = to_step
        self.furthest = max(self.furthest, bad_step)


def reach(health: HealthConfig) -> int:
    """How many steps behind the newest one a checkpoint must stay, for a rollback; 0: none need to."""
    return health.spike_window if "rollback" in (health.on_nonfinite, health.on_spike) else 0
