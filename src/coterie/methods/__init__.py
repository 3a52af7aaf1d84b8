"""Published methods: one file each, registered under its name with its citation and parameters."""

from . import (
    adamix,
    dselect_k,
    emr,
    ensemble,
    hash,
    mhr,
    poly,
    reinforce,
    single,
    smear,
    soft_moe,
    st_gumbel,
    switch,
    tag,
    tall,
)
from .registry import Method, Mixture, get, known
from .smile import smile

__all__ = [
    "Method",
    "Mixture",
    "adamix",
    "dselect_k",
    "emr",
    "ensemble",
    "get",
    "hash",
    "known",
    "mhr",
    "poly",
    "reinforce",
    "single",
    "smear",
    "smile",
    "soft_moe",
    "st_gumbel",
    "switch",
    "tag",
    "tall",
]
