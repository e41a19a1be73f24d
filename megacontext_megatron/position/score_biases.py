"""Which class each score bias is."""

from __future__ import annotations

from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.content_biases import CopeBias, FoxBias, GrapeAPBias
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.initial_values import InitialValues
from megacontext_megatron.position.linear_biases import Alibi, GrapeA
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import ScoreBias
from megacontext_megatron.position.table_biases import FireBias, T5Bias


def build_bias(
    config: BiasConfig,
    share: HeadShare,
    sum_over_ranks: SumOverRanks,
    *,
    hidden_size: int,
    layer_number: int,
    seed: int,
) -> ScoreBias:
    """Return the bias of one layer, counted from 1; `hidden_size` is the width of the attention's input.

    What is drawn depends on `seed`, the layer and the parameter's name alone, so all ranks begin alike.
    """
    values = InitialValues(seed=seed, layer=0 if config.name == "fire" and config.fire_shared else layer_number)
    match config.name:
        case "alibi":
            return Alibi(config, share, sum_over_ranks)
        case "t5":
            return T5Bias(config, share, sum_over_ranks, values)
        case "fire":
            return FireBias(config, share, sum_over_ranks, values)
        case "cope":
            return CopeBias(config, share, sum_over_ranks)
        case "grape-a":
            return GrapeA(config, share, sum_over_ranks, values)
        case "grape-ap":
            return GrapeAPBias(config, share, sum_over_ranks, hidden_size, values)
        case "fox":
            return FoxBias(share, sum_over_ranks, hidden_size, values)
        case "slow-bands":
            # Part of the retrofit kit, which most runs do without.
            from megacontext_megatron.position.retrofit_biases import SlowBands

            return SlowBands(config, share, sum_over_ranks)
