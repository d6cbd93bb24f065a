"""What the trainer calls the degrees of parallelism."""

from __future__ import annotations

import dataclasses

from moeconv.layout.degrees import OPTIONS
from runtime.flag import flag_name
from runtime.parallel.degrees import ParallelConfig

FLAGS = {
    item.name: flag_name(ParallelConfig, item.name)
    for item in dataclasses.fields(ParallelConfig)
    if item.name in OPTIONS.keys() | {"cp", "sp", "tp_comm_overlap", "pp_schedule", "fully_shard"}
}
"""Degree -> its flag."""
