"""Where Lightning restores a run from a checkpoint: its `_CheckpointConnector`."""

from types import FrameType

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

__all__ = ["restores"]


def restores(frame: FrameType) -> bool:
    """Whether a frame of a traceback is one of Lightning's steps of restoring.

    Args:
        frame: From `traceback.walk_tb`.

    Example:
        >>> import inspect
        >>> restores(inspect.currentframe())
        False
    """
    connector = isinstance(frame.f_locals.get("self"), _CheckpointConnector)
    return connector and "restore" in frame.f_code.co_name
