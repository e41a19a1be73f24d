"""Which layers have a sliding window, and which no rotary: Megatron's patterns, checked before anything reads them."""

from __future__ import annotations

import argparse

from megatron.core.transformer.utils import is_layer_window_attention

from megacontext_megatron.config import ConfigError

Namespace = argparse.Namespace


def windowed_layers(args: Namespace) -> tuple[int, ...]:
    """Return the layers, counted from 1, that attend within a sliding window."""
    size, skip = args.window_size, args.window_attn_skip_freq
    return tuple(
        layer for layer in range(1, args.num_layers + 1) if size and is_layer_window_attention(size, skip, layer)
    )


def layers_without_rope(no_rope_freq: int | list[int] | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers, counted from 1, that Megatron's `--no-rope-freq` leaves without rotary."""
    if no_rope_freq is None:
        return ()
    if isinstance(no_rope_freq, int):
        return tuple(range(no_rope_freq, num_layers + 1, no_rope_freq))
    return tuple(layer for layer, skipped in enumerate(no_rope_freq, start=1) if skipped)


def check_layer_patterns(args: Namespace) -> None:
    """Refuse patterns that do not fit the layers, and with the plugin's encodings those that have no effect.

    Raises ConfigError.  Megatron finds the former when layers are built or run.
    """
    for name in ("window_attn_skip_freq", "no_rope_freq"):
        _check_fits(f"--{name.replace('_', '-')}", getattr(args, name), args.num_layers)
    every = args.no_rope_freq
    if isinstance(every, int) and args.num_layers % every:
        raise ConfigError(f"--num-layers {args.num_layers} must be a multiple of --no-rope-freq {every}.")
    if args.mc_encoding is None or args.window_attn_skip_freq is None:
        return
    if args.window_size is None:
        raise ConfigError("--window-attn-skip-freq has no effect without --window-size ROWS,0.")
    if not windowed_layers(args):
        raise ConfigError(
            f"--window-attn-skip-freq {args.window_attn_skip_freq} leaves no layer a window: N leaves every N-th layer "
            "without one, and a list has 1 for each layer with one; or leave --window-size out."
        )


def _check_fits(flag: str, pattern: int | list[int] | None, layers: int) -> None:
    if isinstance(pattern, int) and pattern < 1:
        raise ConfigError(f"{flag} {pattern} must be at least 1: it counts layers.")
    if isinstance(pattern, list) and len(pattern) != layers:
        raise ConfigError(
            f"{flag} has {len(pattern)} entries for --num-layers {layers}: give one for each layer, as in "
            "'([1]*3+[0]*1)'."
        )
