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

TABLE = (
    LOSS,
    LOD_LOSS,
    LOD_COUNT,
    FRAC_LEVEL,
    NLL_LAST,
    ADVANTAGE,
    SUBSTITUTION,
    SPAN_WIDTH,
    SHORTENED,
    COMPRESSION,
    SIGMA_SCALE,
    SIGMA_HISTOGRAM,
    SIGMA_MEAN,
)


def metric_table() -> str:
    """Return the metrics as a Markdown table."""
    lines = ["| metric | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in TABLE]
    return "\n".join(lines)
