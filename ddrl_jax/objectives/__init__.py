"""Advantages, policy terms and the data term, as pure functions."""
