"""Megatron's transformer config with the plugin's settings aboard, so that every layer can read them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megacontext_megatron.config import Settings


@dataclass
class MegaContextTransformerConfig(TransformerConfig):
    """A TransformerConfig whose `mc_settings` holds the run's settings; None only while Megatron fills it in."""

    mc_settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """Return the run's settings."""
        if self.mc_settings is None:
            raise RuntimeError("the transformer config carries no MegaContext settings")
        return self.mc_settings
