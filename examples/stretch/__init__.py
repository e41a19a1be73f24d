"""Stretch: what a frozen base trained with rope makes of contexts two, four and eight times as long.

    python -m examples.stretch --tier cpu --out runs/stretch --jobs 2
    python -m examples.stretch --tier gpu --out runs/stretch --jobs 3 --input FOLDER...

Trains plain Megatron rope at one length, stretches its frequencies without training, then trains adapters on the frozen
base for a few steps at four times the length.
"""
