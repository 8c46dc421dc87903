"""Judges of images: trained rewards and held-out ones."""
