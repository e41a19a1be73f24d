"""The encodings and biases there are, and what each supports; the README's table is made of this."""

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
    "recompute",
    "distributed optimizer",
    "expert parallel",
    "FP8 linear layers",
    "spans",
    "packed sequences",
    "KV cache",
)

_LAYOUTS = frozenset(FEATURES[: FEATURES.index("distributed optimizer")])
_TRAINING = frozenset(FEATURES[: FEATURES.index("spans")])
_ALWAYS_REFUSED = frozenset({"packed sequences"})
_ABSENT = frozenset({"KV cache"})

DENSE = "local: dense"
_ROTATED = (
    DENSE,
    "local with CP: dense, gathered keys",
    "transformer_engine: FlashAttention or cuDNN",
    "transformer_engine with CP: ring, all-to-all, all-gather",
    "triton; with CP: windows by halo, else gathered keys",
    "cudnn, flash4, flex",
)
_BIASED = ("local: dense, biased", "local with CP: dense, biased, gathered keys")
_ON_SCORES = (*_BIASED, "triton; with CP: gathered keys")
_LINEAR = (
    *_ON_SCORES,
    "flex, slopes that do not train",
    "--bias-fold: transformer_engine, cudnn, flash4, flex",
    "--bias-fold with CP: ring, all-to-all, all-gather",
)

PROOFS = {
    "Gaussian": "tests/full/test_layouts.py, tests/gpu",
    "rotary rule": "tests/full/test_encoding_layouts.py (longrope with a start window, damped)",
    "layer's frequencies": "tests/full/test_encoding_layouts.py (grapem per head, clex)",
    "contextual": "tests/full/test_encoding_layouts.py (grapem, contextual)",
    "additive": "tests/full/test_encoding_layouts.py (learned_absolute)",
    "bias": "tests/full/test_encoding_layouts.py (six biases at once)",
    "linear bias": "tests/full/test_encoding_layouts.py (six biases at once), tests/full/test_folded_layouts.py, "
    "tests/integration/test_attention_kernels.py, tests/gpu/test_attention_training.py",
    "row scan": "tests/full/test_encoding_layouts.py (cope)",
    "paths": "tests/full/test_encoding_layouts.py (grape-ap on tokens)",
    "retrofit": "tests/integration/test_retrofit.py, tests/full/test_retrofit_layouts.py",
    "none": "tests/full/test_encoding_layouts.py (fire and grape-a without rotary)",
    "Megatron": "tests/integration/test_identity.py (rope in one process)",
}
"""The tests behind the cells of each mechanism, over layouts.  What each computes is in tests/unit; refusals are in
tests/integration/test_encoding_refusals.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """One encoding or bias: its name, the mechanism that it shares with others, and what it supports on which backend.

    What is in none of `supported`, `refused` and `absent` is untested.
    """

    name: str
    mechanism: str
    supported: frozenset[str]
    refused: frozenset[str] = _ALWAYS_REFUSED
    absent: frozenset[str] = _ABSENT
    backends: tuple[str, ...]

    def support(self, feature: str) -> Support:
        """Return whether the encoding works with one of FEATURES."""
        for names, support in (
            (self.supported, Support.YES),
            (self.refused, Support.REFUSED),
            (self.absent, Support.NO),
        ):
            if feature in names:
                return support
        return Support.UNTESTED


def _rotary(name: str, mechanism: str, *more: str) -> Encoding:
    return Encoding(name=name, mechanism=mechanism, supported=_LAYOUTS | {"spans", *more}, backends=_ROTATED)


def _bias(
    name: str,
    *,
    mechanism: str = "bias",
    refused: frozenset[str] = frozenset(),
    untested: frozenset[str] = frozenset(),
) -> Encoding:
    supported = (_LAYOUTS | {"spans", "distributed optimizer"}) - refused - untested
    backends = _BIASED[:1] if "context parallel" in refused else _BIASED
    refused = refused | _ALWAYS_REFUSED | {"FP8 linear layers"}
    return Encoding(name=name, mechanism=mechanism, supported=supported, refused=refused, backends=backends)


def _additive(name: str) -> Encoding:
    return Encoding(name=name, mechanism="additive", supported=_LAYOUTS | {"spans"}, backends=_ROTATED)


ENTRIES = (
    Encoding(name="gaussian_rope", mechanism="Gaussian", supported=_TRAINING | {"spans"}, backends=_ROTATED),
    *(
        _rotary(name, "rotary rule")
        for name in (
            *("rope", "linear", "ntk", "dynamic_ntk", "yarn", "longrope", "llama3"),
            *("resonance", "resonance_yarn", "mrope", "axial"),
        )
    ),
    *(_rotary(name, "layer's frequencies", "distributed optimizer") for name in ("grapem", "clex", "multiscale")),
    Encoding(
        name="grapem, contextual",
        mechanism="contextual",
        supported=_LAYOUTS | {"spans"},
        refused=_ALWAYS_REFUSED | {"FP8 linear layers"},
        backends=(DENSE, "local with CP: dense, gathered keys"),
    ),
    _additive("sinusoidal"),
    _additive("learned_absolute"),
    Encoding(
        name="none",
        mechanism="none",
        supported=_LAYOUTS - {"pipeline, virtual stages"} | {"spans"},
        backends=_ROTATED,
    ),
    *(
        Encoding(
            name=f"{name}, Megatron's",
            mechanism="Megatron",
            supported=frozenset(),
            refused=_ALWAYS_REFUSED,
            absent=_ABSENT | {"spans"},
            backends=(DENSE, "local with CP: dense, gathered keys", "transformer_engine: Megatron's"),
        )
        for name in ("rope", "learned_absolute", "none")
    ),
)
"""What `--position-embedding-type` takes.  Megatron's own code runs a stock name without flags of the plugin."""

BIAS_ENTRIES = (
    *(
        Encoding(
            name=name,
            mechanism="linear bias",
            supported=_LAYOUTS | {"spans", "distributed optimizer"},
            backends=_LINEAR,
        )
        for name in ("alibi", "grape-a")
    ),
    *(_bias(name) for name in ("t5", "fire", "fox", "slow-bands")),
    _bias(
        "cope",
        mechanism="row scan",
        refused=frozenset({"context parallel"}),
        untested=frozenset({"distributed optimizer"}),
    ),
    _bias(
        "grape-ap",
        mechanism="paths",
        refused=frozenset({"context parallel", "spans"}),
        untested=_LAYOUTS - {"tensor parallel", "sequence parallel", "recompute"} | {"distributed optimizer"},
    ),
    Encoding(
        name="alibi-lora",
        mechanism="retrofit",
        supported=_LAYOUTS - {"context parallel"},
        refused=_ALWAYS_REFUSED | {"distributed optimizer"},
        backends=_ON_SCORES,
    ),
)
"""What `--position-bias` takes, and the bias of `--retrofit alibi-lora`."""


def support_table() -> str:
    """Return the support matrix as Markdown tables, and the tests behind its cells."""
    lines = [*_table("encoding", ENTRIES), "", *_table("bias", BIAS_ENTRIES), "", "| mechanism | tests |", "|---|---|"]
    return "\n".join([*lines, *(f"| {mechanism} | {tests} |" for mechanism, tests in PROOFS.items())])


def _table(title: str, entries: tuple[Encoding, ...]) -> list[str]:
    header = [title, "mechanism", *FEATURES, "core attention"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for entry in entries:
        cells = [f"`{entry.name}`", entry.mechanism, *(entry.support(f) for f in FEATURES), "; ".join(entry.backends)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
