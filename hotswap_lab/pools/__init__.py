"""Pools: many adapters in memory, for one place in a model; and batches in which each row has its own adapter."""
