"""Pure functions on tensors and token lists: advantages, losses, micro-batches."""
