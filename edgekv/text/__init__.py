"""Texts as token windows: from files, from the model itself, from chats."""
