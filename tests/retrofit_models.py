"""Small models with everything that a retrofit adds, built in a rank of any layout without Megatron's training loop."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, GistConfig, RotaryConfig, Settings
from megacontext_megatron.encoding_config import BiasConfig, RetrofitConfig
from megacontext_megatron.spans.metadata import SpanMetadata
from megacontext_megatron.spans.plan import plan_rows

LAYERS, HIDDEN, HEADS, GROUPS, WIDTH, VOCABULARY = 4, 32, 4, 2, 8, 64
CONTEXT = ContextConfig(window=48, source_length=96, block_size=4, recent_tokens=8, horizon=4)
RETROFIT = RetrofitConfig(parts=("damping", "alibi-lora", "slow-bands"), lora_rank=2, lora_length=16)
BANDS = BiasConfig(name="slow-bands", layers=(2, 4), periods=(50.0, 400.0))
SETTINGS = Settings(
    encoding="rope",
    rotary=RotaryConfig(head_dim=WIDTH, base=100),
    context=CONTEXT,
    gaussian=GaussianRopeConfig(learnable_sigma="head", log_width_bias=True),
    biases=(BANDS,),
    gist=GistConfig(hidden=HIDDEN, kind="gistnet", layers=1, hidden_size=16),
    megacontext=True,
    retrofit=RETROFIT,
)
"""All of a retrofit's parts; layers 2 and 4 have bands, and layer 1 has slopes by query."""

LAYER = "decoder.layers.{}.self_attention."
SIZES = {
    **{LAYER.format(n) + "rotary.sigma_scale.log_scale": 2 * GROUPS for n in range(LAYERS)},
    **{LAYER.format(n) + "log_width_bias.factor": 1 for n in range(LAYERS)},
    **{LAYER.format(n) + "score_biases.slow-bands.amplitude": 2 * HEADS for n in (1, 3)},
    LAYER.format(0) + "score_biases.alibi-lora.down": 2 * HIDDEN,
    LAYER.format(0) + "score_biases.alibi-lora.up": 2 * HEADS,
}
"""Length of every positional parameter of the whole model, by its name there."""


def start(tensor: int = 1, pipeline: int = 1) -> None:
    """Make this rank one of Megatron's, on the CPU."""
    from megacontext_megatron import cpu

    cpu.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(7)


def build(settings: Settings = SETTINGS, **overrides: Any) -> Any:
    """Return this rank's stage of the small model, drawn anew; `overrides` are of its transformer config."""
    from megatron.core import parallel_state
    from torch.nn.functional import silu

    from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
    from megacontext_megatron.model.gpt import build_model

    torch.manual_seed(11)
    config = MegaContextTransformerConfig(
        **{
            **{"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": 2 * HIDDEN, "kv_channels": WIDTH},
            **{"num_attention_heads": HEADS, "num_query_groups": GROUPS, "normalization": "RMSNorm"},
            **{"add_bias_linear": False, "gated_linear_unit": True, "activation_func": silu, "init_method_std": 0.3},
            **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "transformer_impl": "local"},
            **{"tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size()},
            **{"pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size()},
            **{"pipeline_dtype": torch.float32, "hetereogenous_dist_checkpoint": True, "mc_settings": settings},
            **overrides,
        }
    )
    return build_model(
        config,
        VOCABULARY,
        CONTEXT.source_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        parallel_output=True,
    )


def value_of(name: str, shape: torch.Size) -> Tensor:
    """Return what a parameter of this name is given in tests: other numbers for each name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_names(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return what the plugin adds to a stage, by its names in the whole model, found by what modules are called."""
    found = {}
    for layer in model.decoder.layers:
        for name, parameter in layer.named_parameters(prefix=f"decoder.layers.{layer.layer_number - 1}"):
            if any(part in name for part in ("sigma_scale", "log_width_bias", "score_biases")):
                found[name] = parameter
    if model.gist_net is not None:
        found |= dict(model.gist_net.named_parameters(prefix="gist_net"))
    return found


def fill(model: Any) -> None:
    """Give everything that the plugin adds its value by name."""
    with torch.no_grad():
        for name, parameter in whole_names(model).items():
            parameter.copy_(value_of(name, parameter.shape))


def loss_of(model: Any) -> Tensor:
    """Return the mean loss of one mixed context, of a model that is one stage."""
    plan = plan_rows(CONTEXT, (1, 0, 3, 0), None)
    starts, levels = (torch.from_numpy(values)[None] for values in (plan.start, plan.level))
    spans = SpanMetadata.of_nodes(starts, levels, CONTEXT.block_size)
    text = torch.arange(CONTEXT.source_length + 1).mul(37).remainder(VOCABULARY)
    labels = text[spans.end]
    mask = torch.ones(1, 1, CONTEXT.window, CONTEXT.window, dtype=torch.bool).triu(1)
    return model(text[None, :-1], spans=spans, labels=labels, attention_mask=mask).losses.float().mean()
