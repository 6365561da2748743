"""Models: conversion and the way back, description, split of the state, report, checkpoints.

The room may import ``plugins``, ``training`` and what stands below them. It offers the functions
that take a model and return one or describe it.
"""

from __future__ import annotations

from fedpara_plugins.models.adapter_ranks import rank_conflict, rank_hint
from fedpara_plugins.models.agreed_plans import adopt_plans, agreed_config, specs_for
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.checkpoints import load_factors, save_dense, save_factors
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.models.dense_copy import to_dense
from fedpara_plugins.models.frozen import frozen_tensors, static_buffers
from fedpara_plugins.models.infinities import check_finite, diverged, restore_infinities
from fedpara_plugins.models.model_report import Report, report
from fedpara_plugins.models.peft_export import save_peft
from fedpara_plugins.models.peft_import import convert_peft
from fedpara_plugins.models.private_start import keep_own_values
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import Shapes, StatePart, find_part, shapes_of
from fedpara_plugins.models.state_split import Split, merge, shared_names, split

__all__ = [
    "ModelSpec",
    "Report",
    "Shapes",
    "Split",
    "StatePart",
    "adopt_plans",
    "agreed_config",
    "check_finite",
    "config_of",
    "convert",
    "convert_peft",
    "diverged",
    "find_part",
    "frozen_tensors",
    "keep_own_values",
    "load_factors",
    "merge",
    "rank_conflict",
    "rank_hint",
    "report",
    "restore_infinities",
    "save_dense",
    "save_factors",
    "save_peft",
    "shapes_of",
    "shared_names",
    "specs_for",
    "split",
    "static_buffers",
    "to_dense",
]
