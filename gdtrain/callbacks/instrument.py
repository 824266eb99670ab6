"""What all instruments share: when they look, what they see, and where they write it.

B examples per update, N training examples, T planned updates, θ parameters, g the gradient of an
update, s its step.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.analysis.gradients import dot, layers
from gdtrain.callbacks.curves import described
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.trial import Snapshot
from gdtrain.descent.work import FREE, Places, Work
from gdtrain.engines import Eager
from gdtrain.generators import seed_all
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import Objective, untouched

__all__ = ["Instrument", "Look", "is_full"]

_log = logging.getLogger("gdtrain")

_PASS = 32  # examples that a pass over others than the batch has, where B is smaller


class Look:
    """One update, seen before it is made; what is computed for one instrument is there for all.

    The model is in training mode. Whatever is looked at, parameters, buffers, optimizer, generators
    and `.grad` stay as they are.

    Args:
        trainer: Lightning's.
        module: Before an update.
        batch: (K, B) indices, of which the first row makes the update.
        with_next: Whether the gradient of the update after it will be asked for.

    Example:
        >>> from functools import partial
        >>> from gdtrain import SGD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import Linear
        >>> class Steps(Instrument):
        ...     def see(self, look):
        ...         return {"longest": max(float(s.abs().max()) for s in look.step)}
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(SGD, lr=0.1))
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     callbacks=[Steps(every=50)])
        >>> trainer.fit(module, datamodule=EmbeddedDataModule("iris", batch_size=1))
    """

    def __init__(
        self, trainer: Trainer, module: SupervisedModule, batch: Tensor, with_next: bool
    ) -> None:
        self.trainer, self.module, self.update = trainer, module, module.updates
        self.loader = cast(IndexLoader, trainer.train_dataloader)
        self.optimizer: Optimizer = trainer.optimizers[0]
        own = module.objective
        assert own is not None, "instruments look at resident examples"
        self.rows = batch[0]
        micro: int | Literal["auto"] | None = own.micro_batch_size
        if own.automatic and micro is None:
            micro = "auto"
        # Objectives of its own: the run's remembers what it measured, and what it warned of.
        self._own = _Recording(own.model, own.loss, own.inputs, own.targets, micro)
        self._wide = Objective(own.model, own.loss, own.inputs, own.targets)
        self._with_next = with_next
        self._taken: tuple[list[Tensor | None], list[Tensor], list[Tensor | None] | None] | None
        self._taken = None
        self.layers = layers(own.model)

    @property
    def objective(self) -> Objective:
        """J, over all N examples."""
        return self._own

    @property
    def params(self) -> list[Tensor]:
        """θ."""
        return [p.detach() for p in self._own.params]

    @property
    def gradient(self) -> list[Tensor | None]:
        """g, for each parameter; None where J does not depend on it."""
        return self._take()[0]

    @property
    def step(self) -> list[Tensor]:
        """s, as optimizer, schedule and step-size rule make it."""
        return self._take()[1]

    @property
    def next_gradient(self) -> list[Tensor | None] | None:
        """The gradient of the next update at θ + s; None after the last."""
        return self._take()[2]

    @property
    def is_full(self) -> bool:
        """Whether an update averages all N examples."""
        return is_full(self.loader)

    @property
    def is_finite(self) -> bool:
        """Whether g and s are: elsewhere there is nothing to see."""
        vectors = ([g for g in self.gradient if g is not None], self.step)
        return all(math.isfinite(dot(v, v)) for v in vectors)

    def gradient_on(self, rows: Tensor, draw: int) -> list[Tensor | None]:
        """∇J at what the parameters are, on other examples.

        Args:
            rows: (n,), int64.
            draw: Names random numbers, from 0; apart from those of training.
        """
        self._take()  # after which an automatic micro-batch size is known
        rows = rows.to(self._own.targets.device)
        size = max(_PASS, self._own.micro_batch_size or len(self.rows))
        while len(rows) % size == 1 and size < len(rows):
            size += 1  # BatchNorm takes no pass of one example
        self._wide.micro_batch_size = size
        named = self.module.draw_of(2**31 + draw % 2**31)
        with untouched(self._own.model):
            # For layers that draw from the generators of torch, Python and NumPy.
            seed_all(named * 1_000_003 + self.loader.seed, self._own.params[0].device)
            return self._wide.value_and_grad(rows, named)[1]

    @contextmanager
    def after(self) -> Iterator[None]:
        """Within it the parameters are θ + s."""
        step = self.step
        kept = [p.clone() for p in self.params]
        try:
            self._set([p + s for p, s in zip(kept, step, strict=True)])
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._own.params, values, strict=True):
            p.copy_(value)

    def _take(self) -> tuple[list[Tensor | None], list[Tensor], list[Tensor | None] | None]:
        """Make the update, and go back."""
        if self._taken is None:
            module, own, update = self.module, self._own, self.update
            before = [p.clone() for p in self.params]
            snapshot = Snapshot(own, self.optimizer)
            try:
                engine = Eager(own, self.optimizer)
                engine(self.rows[None], module.rate_factors(update, 1), module.draw_of(update))
                step = [p - old for p, old in zip(self.params, before, strict=True)]
                following = None
                if self._with_next and update + 1 != module.total_updates:
                    rows = self.loader.block(update + 1, 1)[0].to(self.rows.device)
                    following = own.value_and_grad(rows, module.draw_of(update + 1))[1]
            finally:
                snapshot.give_back()
            assert own.first is not None
            self._taken = own.first, step, following
        return self._taken


def is_full(loader: IndexLoader) -> bool:
    """Whether an update averages all N examples.

    Args:
        loader: Of a run.

    Example:
        >>> is_full(IndexLoader(5, 5)), is_full(IndexLoader(5, 4))
        (True, False)
    """
    return loader.batch_size == loader.num_examples and loader.sampling != "replacement"


class _Recording(Objective):
    """Keeps the first gradient that it was asked for: that of the update."""

    first: list[Tensor | None] | None = None

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        value, gradient = super().value_and_grad(indices, draw)
        if self.first is None:
            self.first = [None if g is None else g.clone() for g in gradient]
        return value, gradient


class Instrument(Callback):
    """Base of the instruments: a subclass says what it sees in a `Look`.

    It looks before an update, and changes nothing: the run is the same, bit for bit, with it and
    without. At which updates is fixed before the first, by the plan alone, and so is the same at
    any speed; a sweep ends before each of them. All instruments of a run that are due share one
    look. Needs the resident examples of a gdtrain data module, and one process; elsewhere it says
    once that it does not look, and the run goes on. No state in checkpoints.

    Args:
        every: Updates from one look to the next, range [1, ∞); the first is before the first
            update. None: as often as `looks` and `share` allow.
        looks: With every=None, at most so many, spread evenly over the planned updates, range
            [1, ∞). Where that number is not known, looks become rarer: so many in each doubling of
            the run.
        share: With every=None, of the run's work, counted in floating-point operations of passes
            over examples (`gdtrain.descent.work`), that this instrument may take, range (0, 1). The
            instruments of a run add their shares up; about a tenth of a second's work they may
            take together in any run.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> class Norm(Instrument):
        ...     def see(self, look):
        ...         return {"weights/norm": sum(float(p.square().sum()) for p in look.params)}
        >>> Norm(every=10).every
        10
    """

    needs_next: ClassVar[bool] = False  # whether it asks for `Look.next_gradient`
    meaning: ClassVar[Mapping[str, str]] = {}  # by tag, or its first words: what TensorBoard says

    def __init__(self, every: int | None = None, looks: int = 100, share: float = 0.004) -> None:
        for name, value in (("every", every), ("looks", looks)):
            if (name == "looks" or value is not None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ValueError(
                    f"{name} must be a whole number of at least 1"
                    f"{', or null' * (name == 'every')}. Received: {name}={value!r}."
                )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"share must lie in (0, 1). Received: share={share!r}.")
        self.every, self.looks, self.share = every, looks, float(share)
        self._party: _Party | None = None
        self.forget()

    @property
    def is_looking(self) -> bool:
        """Whether it can look at the run that is under way."""
        return self._party is not None and self in self._party.peers

    def forget(self) -> None:
        """Be as before the first look; a run that is not resumed begins so."""

    def see(self, look: Look) -> dict[str, float]:
        """What it finds, by tag; what is not finite is left out.

        Args:
            look: At one update.
        """
        raise NotImplementedError

    def passes(self, loader: IndexLoader) -> list[int]:
        """How many examples each of its passes has in a look, beside the update's and the next's.

        Args:
            loader: Knows N and B.
        """
        return []

    def objection(self, trainer: Trainer, loader: IndexLoader) -> str | None:
        """Why it cannot look at this run, if so.

        Args:
            trainer: At the start of training.
            loader: Of its examples.
        """
        return None

    def summary(self) -> dict[str, Any]:
        """What `summary.json` tells of it, in plain containers."""
        return {}

    def draw(self, look: Look, tag: str, values: Any) -> None:
        """Give a histogram to TensorBoard, if it is there.

        Args:
            look: At one update.
            tag: Of the histogram.
            values: Numbers.
        """
        for logger in look.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(tag, values, look.update)

    # ------------------------------------------------------------------ hooks

    def next_update(self, update: int) -> int | None:
        """The next update before which it looks.

        Args:
            update: Number of updates made.
        """
        return None if self._party is None else self._party.next_update(self, update)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the other instruments."""
        if trainer.global_step == 0:
            self.forget()
        self._described: set[str] = set()
        peers = [c for c in trainer.callbacks if isinstance(c, Instrument)]  # type: ignore[attr-defined]
        if peers[0] is self:
            party = _Party(trainer, pl_module, peers)
            for peer in peers:
                peer._party = party

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time."""
        assert self._party is not None
        look = self._party.look(self, trainer, pl_module, batch)
        if look is None:
            return
        context = trainer.strategy.precision_plugin.train_step_context()
        with context, torch.enable_grad(), warnings.catch_warnings():
            # A look may pass more examples than an update has.
            warnings.filterwarnings("ignore", message="BatchNorm normalises each pass")
            found = self.see(look) if look.is_finite else {}
        values = {tag: value for tag, value in found.items() if math.isfinite(value)}
        if values:
            self._log(trainer, look.update, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the last look."""
        self._party = None

    def _log(self, trainer: Trainer, update: int, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                summary = described(values, self._described, self._meaning)
                logger.experiment.file_writer.add_summary(summary, update)
            else:
                logger.log_metrics(values, step=update)

    def _meaning(self, tag: str) -> str:
        known = (m for words, m in self.meaning.items() if f"{tag}/".startswith(f"{words}/"))
        return next(known, "")


class _Party:
    """The instruments of a run, which look together."""

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, peers: Sequence[Instrument]
    ) -> None:
        self.peers = list(peers)
        self._trainer, self._module = trainer, pl_module
        self._places: dict[Instrument, Places] | None = None
        self._at = -1
        self._due: list[Instrument] = []
        self._look: Look | None = None
        reason = _objection(trainer, pl_module)
        loader = cast(IndexLoader, trainer.train_dataloader)
        reasons = {c: reason or c.objection(trainer, loader) for c in peers}
        self.peers = [c for c in peers if reasons[c] is None]
        for reason in dict.fromkeys(reasons.values()):
            if reason is not None:
                self._say([c for c in peers if reasons[c] == reason], reason)

    def _say(self, instruments: Sequence[Instrument], reason: str) -> None:
        if self._trainer.is_global_zero:
            names = ", ".join(type(c).__name__ for c in instruments)
            _log.info("instruments: %s do not look: %s", names, reason)

    def look(
        self, instrument: Instrument, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> Look | None:
        """The look at the update at hand, if it is this instrument's turn."""
        if not instrument.is_looking:
            return None
        module = cast(SupervisedModule, pl_module)
        if module.updates != self._at:
            self._at, self._look = module.updates, None
            self._due = [c for c, places in self.places.items() if self._at in places]
            if self._due:
                following = any(c.needs_next for c in self._due)
                self._look = Look(trainer, module, batch, following)
        look = self._look if instrument in self._due else None
        if self._due and instrument is self._due[-1]:
            self._look = None  # it holds as many numbers as the model, several times
        return look

    def next_update(self, instrument: Instrument, update: int) -> int | None:
        """The next update at which an instrument looks; None: it does not look any more."""
        places = self.places.get(instrument)
        return None if places is None else places.next(update)

    @property
    def places(self) -> dict[Instrument, Places]:
        """Where each looks: known when the module has begun, which is after the callbacks have."""
        if self._places is None:
            self._places = self._planned()
        return self._places

    def _planned(self) -> dict[Instrument, Places]:
        fixed = {c: Places(None, None, c.every) for c in self.peers if c.every is not None}
        free = [c for c in self.peers if c.every is None]
        if not free:
            return fixed
        module = cast(SupervisedModule, self._module)
        loader, total = cast(IndexLoader, self._trainer.train_dataloader), module.total_updates
        assert module.objective is not None, "instruments look at resident examples"
        work = Work.of(module.objective, loader.batch_size)
        # Those that look at the same updates share the update, and the next.
        together = [[c for c in free if c.looks == many] for many in {c.looks for c in free}]
        cost = sum(
            work.passes([loader.batch_size] * (2 + any(c.needs_next for c in group)))
            + sum(work.passes(c.passes(loader)) for c in group)
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


def _objection(trainer: Trainer, pl_module: LightningModule) -> str | None:
    loader = trainer.train_dataloader
    if not isinstance(loader, IndexLoader) or not isinstance(pl_module, SupervisedModule):
        return (
            "they need a SupervisedModule and the resident examples of a gdtrain data module "
            f"(received: {type(pl_module).__name__} and {type(loader).__name__})."
        )
    if trainer.world_size > 1:
        return f"they need one process (received: {trainer.world_size})."
    return None
