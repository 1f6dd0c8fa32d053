"""An OpenAI-compatible server: HTTP in front, and in a process of its own an engine that answers several at a time."""
