"""MegaContext for Megatron-Core: train language models whose context rows are tokens or gists.

The packages follow the data: ``data`` (what arrives), ``spans`` (where each row lies), ``context`` (what the rows
are), ``position`` (how place becomes numbers), ``attention`` (where it touches the model), ``model``, ``telemetry``
(what was seen); ``retrofit``, ``cpu``, ``startup`` and ``doctor`` stand around that line.
"""

__version__ = "0.1.0"
