"""Verified lifting: blocks of plain Python become gate and experts ops, each with a certificate. See lift.py."""

from moec.compiler.capture.lifting.lift import LiftedBlock, lift_block
from moec.compiler.capture.lifting.refused import Refusal
from moec.compiler.capture.lifting.swap import Swapped, refusal_texts, swap_blocks

__all__ = ["LiftedBlock", "Refusal", "Swapped", "lift_block", "refusal_texts", "swap_blocks"]
