"""Computes, merges and stores statistics."""
