"""Atomic, verified, crash-safe checkpoints: see the README for ten lines that use it.

Importing this package does not import torch; saving or loading tensors does.
"""

from matilda_ckpt.background import SaveHandle
from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.checkpointer import Checkpointer
from matilda_ckpt.errors import (
    CheckpointError,
    DamagedError,
    LockedError,
    NotFiniteError,
    NoValidCheckpointError,
    OtherFormatError,
    SaveError,
    UnreadableError,
)
from matilda_ckpt.manifest import Manifest
from matilda_ckpt.reading import VerifyReport, load_state, verify
from matilda_ckpt.restored import Restored, Skipped
from matilda_ckpt.retention import Keep
from matilda_ckpt.rng import RngState, capture_rng, restore_rng
from matilda_ckpt.scrubber import Scrubber

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "Checkpointer",
    "DamagedError",
    "Keep",
    "LockedError",
    "Manifest",
    "NoValidCheckpointError",
    "NotFiniteError",
    "OtherFormatError",
    "Restored",
    "RngState",
    "SaveError",
    "SaveHandle",
    "Scrubber",
    "Skipped",
    "UnreadableError",
    "VerifyReport",
    "capture_rng",
    "load_state",
    "restore_rng",
    "verify",
]
__version__ = "0.1.0"
