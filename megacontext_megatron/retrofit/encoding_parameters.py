"""What the parameters of encodings and biases are made for, as flags say it: whether a checkpoint's fit a run."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megacontext_megatron.encoding_flags import ENCODING_FLAGS

Namespace = argparse.Namespace

LEARNED_FREQUENCIES = ("grapem", "clex")
WITHOUT_PARAMETERS = ("alibi",)
ADAPTERS = ("alibi-lora", "slow-bands")
"""What --retrofit adds that has parameters."""


def encoding_defaults() -> dict[str, Any]:
    """Return what the flags of encodings were where a checkpoint is older than they are."""
    return {field.name: getattr(group(), field.name) for group in ENCODING_FLAGS for field in dataclasses.fields(group)}


def encoding_parameters(args: Namespace) -> dict[str, Any]:
    """Return what the parameters of a run's encoding and biases are made for, by the flag that says so."""
    encoding = getattr(args, "mc_encoding", None)
    if encoding is None:
        return {}
    found: dict[str, Any] = {}
    frequencies = args.gaussian_rope_base if encoding == "gaussian_rope" else encoding
    if frequencies in LEARNED_FREQUENCIES:
        found["position_embedding_type"] = frequencies
        of = {
            "grapem": ("grapem_learnable_freq", "grapem_per_head", "grapem_contextual"),
            "clex": ("clex_hidden_factor",),
        }
        found |= {name: getattr(args, name) for name in of[frequencies]}
    if encoding == "learned_absolute":
        found["max_position_embeddings"] = args.max_position_embeddings
    biases = {*args.position_bias, *(["grape-a"] if args.grape_a else []), *(set(args.retrofit) & set(ADAPTERS))}
    if "grape-a" in biases and not args.grape_a_learnable and args.grape_a_gate == "none":
        biases.remove("grape-a")
    found |= {f"position_bias {name}": True for name in sorted(biases - set(WITHOUT_PARAMETERS))}
    of_bias = {
        "t5": ("t5_num_buckets",),
        "fire": ("fire_hidden_size", "fire_num_layers", "fire_shared"),
        "cope": ("cope_positions",),
        "slow-bands": ("slow_band_periods",),
        "grape-a": ("grape_a", "grape_a_gate", "grape_a_learnable"),
        "alibi-lora": ("retrofit_lora_rank",),
    }
    return found | {name: getattr(args, name) for bias in sorted(biases) for name in of_bias.get(bias, ())}
