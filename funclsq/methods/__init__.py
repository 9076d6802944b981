"""Forward numerics, one method per file: no autograd, several right-hand sides first."""
