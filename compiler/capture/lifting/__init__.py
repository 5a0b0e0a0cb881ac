"""Verified lifting: blocks of plain Python become gate and experts ops, each with a certificate. See lift.py."""

from moec.compiler.capture.lifting.lift import LiftedBlock, lift_block
from moec.compiler.capture.lifting.refused import Refusal

__all__ = ["LiftedBlock", "Refusal", "lift_block"]
