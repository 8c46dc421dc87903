"""Prompts and captioned pictures."""
