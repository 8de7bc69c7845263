"""Count a run's rollbacks to a checkpoint, and detect that they do not help."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.schema import HealthConfig


@dataclass
class Rollbacks:
    """The rollbacks of a run. Checkpoints hold these counts too.

    total: all rollbacks of the run.
    undone: steps that were made and then undone by a rollback.
    base: the step of the last rollback's checkpoint.
    furthest: the latest step that went wrong.
    in_vain: rollbacks since the last good step after `furthest`.
    """

    total: int = 0
    undone: int = 0
    base: int = 0
    furthest: int = 0
    in_vain: int = 0

    def made(self, step: int) -> None:
        """Note that a step went well."""
        if step > self.furthest:
            self.in_vain = 0

    def good_until(self, bad_step: int, distance: int) -> int:
        """The newest step whose checkpoint counts as good when `bad_step` goes wrong.

        It lies `distance` steps earlier, since a fault may begin before it shows. The step of the last rollback stays
        good, since the steps after it were made anew.
        """
        return max(bad_step - distance, self.base)

    def taken_back(self, bad_step: int, to_step: int) -> None:
        """Note a rollback from `bad_step` to the checkpoint of `to_step`."""
        self.total += 1
        self.in_vain += 1
        self.undone += bad_step - 1 - to_step
        self.base = to_step
        self.furthest = max(self.furthest, bad_step)


def reach(health: HealthConfig) -> int:
    """How many steps back from the newest one checkpoints must be kept for a rollback; 0 if there are no rollbacks."""
    return health.spike_window if "rollback" in (health.on_nonfinite, health.on_spike) else 0
