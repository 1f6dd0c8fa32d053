"""Conversations: prompt templates, sampling, token generation, sessions."""
