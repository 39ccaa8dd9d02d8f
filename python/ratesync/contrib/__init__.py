"""Integrations, each with its own extra: `fastapi`, `prometheus`, `otel`. They use the public API only."""
