"""The table of metrics: name, unit and meaning; every other file takes names from here."""

from __future__ import annotations

from dataclasses import dataclass

from megacontext_megatron import config


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric; `{level}`, `{layer}`, `{variant}` and `{H}` in a name are filled in."""

    name: str
    unit: str
    meaning: str

    def at(self, **values: object) -> str:
        """Return the name with its parts filled in."""
        return self.name.format(**values)


LOSS = Metric(name="lm loss", unit="nats per row", meaning="next-token loss over all rows of the interval")
LOD_LOSS = Metric(name="mc/lod_loss/{level}", unit="nats per row", meaning="next-token loss of rows at a level")
LOD_COUNT = Metric(name="mc/lod_count/{level}", unit="rows per step", meaning="rows of mixed contexts at a level")
FRAC_LEVEL = Metric(name="mc/frac_level/{level}", unit="fraction", meaning="share of mixed contexts' rows at a level")
NLL_LAST = Metric(name=config.NLL_LAST, unit="nats per token", meaning="loss of the last H rows, by variant")
ADVANTAGE = Metric(
    name="mc/adv_delta_mean",
    unit="nats per token",
    meaning="loss of the last H rows of the mixed variants minus that of the recency variant; negative is better",
)
SUBSTITUTION = Metric(
    name="mc/delta_sub/{H}",
    unit="nats per token",
    meaning="loss of the last H rows of mixed contexts minus that with all C tokens as rows (evaluate)",
)
SHUFFLED = Metric(
    name="mc/shuffled_gist_dnll",
    unit="nats per token",
    meaning="loss of the last H rows when gists are exchanged between samples, minus that of mixed contexts (probe)",
)
PERMUTED = Metric(
    name="mc/permuted_dnll",
    unit="nats per token",
    meaning="loss of the last H rows when the rows before them change their order but not their places, minus that in "
    "order; 0 but for rounding (probe; dense attention, which is given a mask that compares places)",
)
PERMUTED_ROW_CAUSAL = Metric(
    name="mc/permuted_dnll/row_causal",
    unit="nats per token",
    meaning="the same where attention masks by the number of the row, so that permuted rows see others (probe)",
)
BLUR = Metric(
    name="mc/pos/blur_dnll/{factor}",
    unit="nats per token",
    meaning="loss of the last H rows of mixed contexts with every sigma times a factor, minus that at 1 (probe)",
)
SPAN_WIDTH = Metric(name="mc/span_width_mean", unit="tokens", meaning="mean width of mixed contexts' rows")
SHORTENED = Metric(
    name="mc/shortened_tokens_mean",
    unit="tokens",
    meaning="history left out of mixed contexts because documents end inside the blocks that would have to collapse",
)
COMPRESSION = Metric(name="mc/compression", unit="tokens per row", meaning="C / W")
SIGMA_SCALE = Metric(
    name="mc/pos/sigma_scale/{layer}/{level}", unit="factor", meaning="learned factor on sigma, mean over query groups"
)
SIGMA_HISTOGRAM = Metric(
    name="mc/pos/sigma_hist/{level}", unit="tokens", meaning="sigma of a level over layers and query groups"
)
SIGMA_MEAN = Metric(name="mc/pos/sigma_mean/{level}", unit="tokens", meaning="mean of that histogram")

OFFSET = Metric(
    name="mc/pos/offset_mean_abs/{level}",
    unit="tokens",
    meaning="mean distance by which gists of a level moved their centre (--mc-gist-span-head)",
)
TERM = Metric(name="mc/term/{name}", unit="see flag", meaning="a term of the objective, before its weight")
SPREAD = Metric(
    name="mc/gist/spread",
    unit="fraction",
    meaning="how unlike the directions of a micro-batch's level-1 gists are: 0 where all are the same",
)
GRADIENT = Metric(name="mc/grad/{part}", unit="", meaning="gradient norm of a trainable part in the last step")
NOT_WORSE = Metric(
    name="mc/guard/shuffled_not_worse", unit="0 or 1", meaning="whether gists of other samples serve as well (probe)"
)
PREDICTION_LOSS = Metric(
    name="mc/mp/loss/{level}", unit="see flag", meaning="loss of rows that predict the next gist of a level"
)
AGREEMENT = Metric(name="mc/mp/agreement/{level}", unit="cosine", meaning="of predicted and actual next gist")
AGREEMENT_FROM = Metric(
    name="mc/mp/agreement/{level}/from/{row_level}",
    unit="cosine",
    meaning="the same by the level, and so the sigma, of the row that predicts",
)
ACCEPTED = Metric(
    name="mc/mp/accept_rate/{level}",
    unit="fraction",
    meaning="share of predictions nearer to their own gist than to every other of the micro-batch",
)

TRACK = "mc/track"
"""Entry of the W&B configuration: A for training with working contexts, off without."""

TABLE = (
    LOSS,
    LOD_LOSS,
    LOD_COUNT,
    FRAC_LEVEL,
    NLL_LAST,
    ADVANTAGE,
    SUBSTITUTION,
    SHUFFLED,
    PERMUTED,
    PERMUTED_ROW_CAUSAL,
    BLUR,
    SPAN_WIDTH,
    SHORTENED,
    COMPRESSION,
    SIGMA_SCALE,
    SIGMA_HISTOGRAM,
    SIGMA_MEAN,
    OFFSET,
    TERM,
    SPREAD,
    GRADIENT,
    NOT_WORSE,
    PREDICTION_LOSS,
    AGREEMENT,
    AGREEMENT_FROM,
    ACCEPTED,
)


def metric_table() -> str:
    """Return the metrics as a Markdown table."""
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in TABLE]
    return "\n".join(lines)
