"""The embedded default: emoji data, the base policy and the held-out judge."""
