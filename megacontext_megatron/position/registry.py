"""The encodings `--position-embedding-type` takes here, and what each supports; the README's table is made of this."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Support(StrEnum):
    """Whether a feature works with an encoding: refused by name where it was asked for, or not there to ask for."""

    YES = "yes"
    UNTESTED = "untested"
    REFUSED = "refused"
    NO = "no"


FEATURES = (
    "tensor parallel",
    "sequence parallel",
    "context parallel",
    "pipeline, virtual stages",
    "expert parallel",
    "distributed optimizer",
    "recompute",
    "FP8 linear layers",
    "spans",
    "packed sequences",
    "KV cache",
)

_TRAINING = frozenset(FEATURES[: FEATURES.index("spans")])
_REFUSABLE = frozenset({"spans", "packed sequences"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """One encoding: its name, whose code runs it, the features it supports, and on which core attention."""

    name: str
    code: str
    supported: frozenset[str] = frozenset()
    untested: frozenset[str] = frozenset()
    backends: tuple[str, ...]

    def support(self, feature: str) -> Support:
        """Return whether the encoding works with one of FEATURES."""
        if feature in self.supported:
            return Support.YES
        if feature in self.untested:
            return Support.UNTESTED
        return Support.REFUSED if feature in _REFUSABLE else Support.NO


REGISTRY = {
    entry.name: entry
    for entry in (
        Encoding(
            name="gaussian_rope",
            code="plugin",
            supported=_TRAINING | {"spans"},
            backends=(
                "local: dense",
                "local with CP: dense, gathered keys",
                "transformer_engine: FlashAttention or cuDNN",
                "transformer_engine with CP: ring, all-to-all, all-gather",
            ),
        ),
        *(
            Encoding(
                name=name,
                code="Megatron",
                untested=_TRAINING,
                backends=(
                    "local: dense",
                    "local with CP: dense, gathered keys",
                    "transformer_engine: Megatron's (not tested here)",
                ),
            )
            for name in ("rope", "learned_absolute", "none")
        ),
    )
}


def support_table() -> str:
    """Return the support matrix as a Markdown table, one row for each encoding."""
    header = ["encoding", "code", *FEATURES, "core attention"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in REGISTRY.values():
        cells = [f"`{entry.name}`", entry.code, *(entry.support(f) for f in FEATURES), "; ".join(entry.backends)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
