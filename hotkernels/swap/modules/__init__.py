"""The published modules that swap knows, by their structure, each with its fused forward."""

from . import key_value_attention, mlp, routing_attention, selecting_attention, self_attention  # noqa: F401  (registers them)
