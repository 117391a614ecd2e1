"""The engine: everything with state, in layers (see docs/design.md)."""
