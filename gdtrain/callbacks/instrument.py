"""What all instruments share: when they measure, and where they write it.

B examples per update, N training examples, T planned updates.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.work import FREE, Places, Work
from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Interval, Whole
from gdtrain.reporting.tensorboard import described

__all__ = ["Instrument", "log_described"]

_log = logging.getLogger("gdtrain")


class Instrument(Callback):
    """Base of the instruments: a subclass says what it measures of a `TrialUpdate`.

    It looks before an update, and changes nothing: the run is the same, bit for bit, with it and
    without. At which updates is fixed before the first, by the plan alone. All instruments of a run
    that are due share one trial. Needs the resident examples of a gdtrain data module, and one
    process; elsewhere it says once that it does not look. No state in checkpoints.

    Args:
        every: Updates from one look to the next, from 0 on, range [1, ∞). None: as often as `looks`
            and `share` allow.
        looks: With every=None, at most so many, spread evenly over the planned updates, range
            [1, ∞); where their number is not known, so many in each doubling of the run.
        share: With every=None, of the run's work (`gdtrain.descent.work`), that this instrument may
            take, range (0, 1). The instruments of a run add their shares up; about a tenth of a
            second's work they may take together in any run.

    Example:
        >>> class LongestStep(Instrument):
        ...     def measure(self, update):
        ...         return {"step/longest": max(float(s.abs().max()) for s in update.step)}
        >>> callback = LongestStep(every=10)
    """

    needs_next: ClassVar[bool] = False  # whether it asks for `TrialUpdate.next_gradient`
    meaning: ClassVar[Mapping[str, str]] = {}  # by tag, or its first words: what TensorBoard says

    def __init__(self, every: int | None = None, looks: int = 100, share: float = 0.004) -> None:
        self.every = None if every is None else Whole(1).check("every", every)
        self.looks = Whole(1).check("looks", looks)
        self.share = Interval(0, 1).check("share", share)
        self._run: _InstrumentsOfRun | None = None
        self.forget()

    @property
    def is_looking(self) -> bool:
        """Whether it can look at the run that is under way."""
        return self._run is not None and self in self._run.peers

    def forget(self) -> None:
        """Be as before the first look; a run that is not resumed begins so."""

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """What it finds of the update that comes next, by tag; what is not finite is left out."""
        raise NotImplementedError

    def passes(self, loader: IndexLoader) -> list[int]:
        """Examples in each of its passes of a look, beside the update's and the next's."""
        return []

    def objection(self, trainer: Trainer, loader: IndexLoader) -> str | None:
        """Why it cannot look at the run that begins, if so."""
        return None

    def summary(self) -> dict[str, Any]:
        """What `summary.json` tells of it, in plain containers."""
        return {}

    def draw(self, update: TrialUpdate, tag: str, values: Any) -> None:
        """Give numbers to TensorBoard as a histogram, if it is there."""
        assert self._run is not None
        for logger in self._run.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(tag, values, update.number)

    def next_update(self, update: int) -> int | None:
        """The next update before which it looks."""
        places = None if self._run is None else self._run.places.get(self)
        return None if places is None else places.next(update)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the other instruments."""
        if trainer.global_step == 0:
            self.forget()
        self._described: set[str] = set()
        peers = [c for c in trainer.callbacks if isinstance(c, Instrument)]  # type: ignore[attr-defined]
        if peers[0] is self:
            run = _InstrumentsOfRun(trainer, pl_module, peers)
            for peer in peers:
                peer._run = run

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Look, if it is time."""
        assert self._run is not None
        update = self._run.due(self)
        if update is None:
            return
        context = trainer.strategy.precision_plugin.train_step_context()
        with context, torch.enable_grad(), warnings.catch_warnings():
            # More examples may be passed than an update has.
            warnings.filterwarnings("ignore", message="BatchNorm normalises each pass")
            found = self.measure(update) if update.is_finite else {}
        values = {tag: value for tag, value in found.items() if math.isfinite(value)}
        if values:
            log_described(trainer, update.number, values, self._described, self._meaning)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Let go of the run."""
        self._run = None

    def _meaning(self, tag: str) -> str:
        known = (m for words, m in self.meaning.items() if f"{tag}/".startswith(f"{words}/"))
        return next(known, "")


def log_described(
    trainer: Trainer,
    update: int,
    values: Mapping[str, float],
    known: set[str],
    meaning: Callable[[str], str],
) -> None:
    """Give numbers to all loggers; TensorBoard gets the meaning with the first of each tag.

    `known` are the tags that have theirs; those of these values are added.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if trainer.is_global_zero:
                summary = described(values, known, meaning)
                logger.experiment.file_writer.add_summary(summary, update)
        else:
            logger.log_metrics(dict(values), step=update)


class _InstrumentsOfRun:
    """The instruments of a run: when each is due, and the trial that they share."""

    def __init__(self, trainer: Trainer, pl_module: Any, peers: Sequence[Instrument]) -> None:
        self.trainer, self._module = trainer, pl_module
        self._loader = cast(Any, trainer.train_dataloader)
        self._at = -1
        self._due: list[Instrument] = []
        self._update: TrialUpdate | None = None
        reason = self._objection()
        reasons = {c: reason or c.objection(trainer, self._loader) for c in peers}
        self.peers = [c for c in peers if reasons[c] is None]
        for reason in dict.fromkeys(reasons.values()):
            if reason is not None:
                self._say([c for c in peers if reasons[c] == reason], reason)

    def _objection(self) -> str | None:
        loader, module, ranks = self._loader, self._module, self.trainer.world_size
        if not isinstance(loader, IndexLoader) or not isinstance(module, SupervisedModule):
            return (
                "they need a SupervisedModule and the resident examples of a gdtrain data module "
                f"(received: {type(module).__name__} and {type(loader).__name__})."
            )
        return f"they need one process (received: {ranks})." if ranks > 1 else None

    def _say(self, instruments: Sequence[Instrument], reason: str) -> None:
        if self.trainer.is_global_zero:
            names = ", ".join(type(c).__name__ for c in instruments)
            _log.info("instruments: %s do not look: %s", names, reason)

    def due(self, instrument: Instrument) -> TrialUpdate | None:
        """The update at hand, if it is one that this instrument measures."""
        if instrument not in self.peers:
            return None
        module = self._module
        number = module.updates
        if number != self._at:
            self._at, self._update = number, None
            self._due = [c for c, places in self.places.items() if number in places]
            if self._due:
                following = any(c.needs_next for c in self._due)
                self._update = TrialUpdate(
                    module.objective,
                    self.trainer.optimizers[0],
                    self._loader,
                    number,
                    module.rate_factors(number, 1),
                    draw=module.loop.draw_of(0),
                    with_next=following and number + 1 != module.total_updates,
                )
        update = self._update if instrument in self._due else None
        if self._due and instrument is self._due[-1]:
            self._update = None  # it holds as many numbers as the model, several times
        return update

    @cached_property
    def places(self) -> dict[Instrument, Places]:
        """Where each looks: known when the module has begun, which is after the callbacks have."""
        fixed = {c: Places(None, None, c.every) for c in self.peers if c.every is not None}
        free = [c for c in self.peers if c.every is None]
        if not free:
            return fixed
        size, total = self._loader.batch_size, self._module.total_updates
        work = Work.of(self._module.objective, size)
        # Those that look at the same updates share the update, and the next.
        together = [[c for c in free if c.looks == many] for many in {c.looks for c in free}]
        cost = sum(
            work.passes([size] * (2 + any(c.needs_next for c in group)))
            + sum(work.passes(c.passes(self._loader)) for c in group)
            for group in together
        )
        share = sum(c.share for c in free)
        if total is None:
            every = max(1, math.ceil(cost / (share * work.update)))
            return {**fixed, **{c: Places(None, c.looks, every) for c in free}}
        paid = int(max(share * total * work.update, FREE) / cost)
        if not paid:
            self._say(
                free,
                f"a look would take more than a share of {share:g} of the run's work (a larger "
                f"share, or every=…, lets them).",
            )
            return fixed
        return {**fixed, **{c: Places(total, min(c.looks, paid)) for c in free}}
