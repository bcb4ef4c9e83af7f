"""`arra doctor`: what a run would need, found out before it starts."""
