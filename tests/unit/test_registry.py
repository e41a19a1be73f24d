"""The registry names every encoding and bias that flags take, and a test file for every mechanism."""

from pathlib import Path

from megacontext_megatron.config import ENCODINGS, STOCK_ENCODINGS
from megacontext_megatron.encoding_config import BIASES
from megacontext_megatron.position.registry import BIAS_ENTRIES, ENTRIES, FEATURES, PROOFS, Support

ROOT = Path(__file__).parents[2]


def test_every_name_that_flags_take_has_an_entry():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert {*ENCODINGS, *STOCK_ENCODINGS} <= set(names)
    assert {entry.name for entry in BIAS_ENTRIES} == {*BIASES, "alibi-lora"}


def test_every_mechanism_names_tests_that_exist():
    assert {entry.mechanism for entry in (*ENTRIES, *BIAS_ENTRIES)} == PROOFS.keys()
    for proof in PROOFS.values():
        for path in proof.split(" (")[0].split(", "):
            assert (ROOT / path).exists()


def test_a_feature_has_one_answer():
    for entry in (*ENTRIES, *BIAS_ENTRIES):
        claims = (entry.supported, entry.refused, entry.absent)
        assert all(claim <= set(FEATURES) for claim in claims)
        assert sum(len(claim) for claim in claims) == len(frozenset().union(*claims))
        assert entry.support("packed sequences") == Support.REFUSED
