"""A small case of the attention benchmarks: rows, heads, and the plugin's attention in plain PyTorch."""

import dataclasses

import torch

from megacontext_megatron.kernels.attention_reference import reference_attention
from scripts.benchmarks import attention_oracle, global_bias, peers, reach_skip
from scripts.benchmarks.attention_inputs import LOOK_BACK, AttentionInputs
from scripts.benchmarks.attention_ours import Attention
from scripts.benchmarks.inputs import Shape
from scripts.benchmarks.rotary_forward import Turns

CPU = torch.device("cpu")
SHAPE = Shape(rows=256, batch=2, query_heads=4, groups=2, head_dim=16)
INPUTS = AttentionInputs(shape=SHAPE, device=CPU)
REFERENCE = Attention.reference()
RULE = attention_oracle.Rule(scale=INPUTS.scale)
WINDOW = attention_oracle.Rule(scale=INPUTS.scale, look_back=LOOK_BACK)
HEADS = {"query": INPUTS.query, "key": INPUTS.key, "value": INPUTS.value}
ROWS = attention_oracle.sample_of(SHAPE.rows, 20, CPU)
NOBODY = Turns({peers.FUSED: "gone", peers.LIGER: "gone"})


def task():
    """Return the rows and slopes of group E at a small shape."""
    return global_bias.Task(inputs=INPUTS)


def reached(**changes):
    """Return the rows and slopes of group F at a small shape."""
    shape = dataclasses.replace(SHAPE, batch=1)
    given = {"name": "tokens", "centres": "tokens", "shape": shape, "device": "cpu", **changes}
    return reach_skip.Task(**given)


def plain_attention(query, key, value):
    """Return causal attention without a bias."""
    return reference_attention(query, key, value, INPUTS.scale)
