"""The OpenAI-compatible HTTP API: `app.create_app` builds it over any `EngineClient`."""
