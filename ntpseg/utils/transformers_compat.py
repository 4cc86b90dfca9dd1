"""Names that differ between the supported releases of transformers."""

from __future__ import annotations

from transformers.modeling_outputs import BaseModelOutputWithPast

# The decoding cache, as keyword of a decoder and as field of its output; renamed in 5.24.
CACHE: str = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
