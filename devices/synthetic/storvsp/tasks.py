"""What a controller was asked for and has not answered yet: how much at most, what waits, and waiting for its end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.synthetic.storvsp.lun import Lun
    from devices.vmbus.channel import Channel
    from pyvmm.core.worker import Timer

#: Commands under way of one logical unit, and of a controller. They bound what a guest makes the host remember; the
#: rest is answered with TASK SET FULL, after which guests send less and repeat.
MAX_OF_LUN = 256
MAX_OF_CONTROLLER = 1024
#: Resets that wait for the commands before them.
MAX_WAITING = 8


class Task:
    """One thing that came over `channel`, for `lun` unless it concerns the whole controller.

    `run` is called, on any thread and with no locks held, once the task need not wait any more.
    """

    __slots__ = ("channel", "lun", "run", "timer")

    def __init__(self, channel: Channel, lun: Lun | None) -> None:
        self.channel = channel
        self.lun = lun
        self.run: Callable[[], object] = lambda: None
        self.timer: Timer | None = None


class Tasks:
    """The tasks of one controller; any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: set[Task] = set()
        self._of_lun: dict[Lun, int] = {}
        #: Those that wait for the end of others, and for which.
        self._waiting: dict[Task, set[Task]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def admit(self, task: Task, lun: Lun) -> bool:
        """Take in a task of `lun`; False if there are too many already."""
        with self._changed:
            number = self._of_lun.get(lun, 0)
            if number >= MAX_OF_LUN or len(self._tasks) >= MAX_OF_CONTROLLER:
                return False
            self._of_lun[lun] = number + 1
            self._tasks.add(task)
            return True

    def admit_last(self, task: Task, lun: Lun | None) -> bool:
        """Take in a task to run once all others of `lun` are done, or of the controller; False if too many wait."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                return False
            others = {other for other in self._tasks if lun is None or other.lun is lun}
            self._tasks.add(task)
            if others:
                self._waiting[task] = set(others)
        if others:
            self._run_delayed(others)
        else:
            task.run()
        return True

    def done(self, task: Task) -> None:
        """A task has been answered, or nobody wants the answer any more. Runs what waited for it alone."""
        freed: list[Task] = []
        with self._changed:
            self._tasks.remove(task)
            if task.lun is not None:
                number = self._of_lun.pop(task.lun) - 1
                if number:
                    self._of_lun[task.lun] = number
            for other, others in list(self._waiting.items()):
                others.discard(task)
                if not others:
                    del self._waiting[other]
                    freed.append(other)
            self._changed.notify_all()
        for other in freed:
            other.run()

    def delay(self, task: Task, call_later: Callable[[Callable[[], None]], Timer]) -> None:
        """Run `task` when the timer ends that `call_later` sets, or as soon as somebody waits for its end."""
        with self._changed:  # the timer may end before we have noted it
            awaited = any(task in others for others in self._waiting.values())
            if not awaited and not (task.lun is not None and task.lun.gone):
                task.timer = call_later(lambda: self._run_delayed({task}))
                return
        task.run()

    def wait(self, concerns: Callable[[Task], bool]) -> None:
        """Return once no task is left that `concerns` selects; delayed ones run at once. The caller stops new ones."""
        with self._changed:
            delayed = set(filter(concerns, self._tasks))
        self._run_delayed(delayed)
        with self._changed:
            self._changed.wait_for(lambda: not any(map(concerns, self._tasks)))

    def abandon(self, channel: Channel) -> None:
        """Forget what waits on a channel that is no more, and return once nothing of it is under way."""
        with self._changed:
            delayed = {task for task in self._tasks if task.channel is channel}
        for task in self._take_delayed(delayed):
            self.done(task)
        self.wait(lambda task: task.channel is channel)

    def _run_delayed(self, tasks: set[Task]) -> None:
        for task in self._take_delayed(tasks):
            task.run()

    def _take_delayed(self, tasks: set[Task]) -> list[Task]:
        """Those of `tasks` that wait for a timer, which then does nothing any more."""
        taken: list[Task] = []
        with self._changed:
            for task in tasks:
                if task.timer is not None:
                    task.timer.cancel()
                    task.timer = None
                    taken.append(task)
        return taken
