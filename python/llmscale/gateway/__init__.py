"""The HTTP door of a fleet: OpenAI's API, server-sent events, health, metrics and the chat page, on one event loop."""
