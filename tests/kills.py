"""A kill of stage 3 in the same process, at a chosen update."""

import contextlib
from collections.abc import Iterator

import pytest

from ral_gym.agents.callbacks import RunCallback


class Killed(BaseException):
    """Stands for a kill: nothing after it is done."""


@contextlib.contextmanager
def killed_after(updates: int) -> Iterator[None]:
    """The training in the block dies after so many updates; a training that does not is an error."""
    after = RunCallback._after_update

    def die(self: RunCallback) -> None:
        after(self)
        if self.updates == updates:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunCallback, "_after_update", die)
        yield
