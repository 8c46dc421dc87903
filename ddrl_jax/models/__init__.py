"""Networks in Flax Linen behind the Pipeline of interfaces.py."""
