"""What only phones have: who may call."""
