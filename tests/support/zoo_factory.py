"""Factories for `package.module:factory` names."""

from __future__ import annotations

import torch
from zoo import model_of


def mixtral() -> torch.nn.Module:
    return model_of("mixtral")
