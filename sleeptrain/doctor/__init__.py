"""`sleeptrain doctor`: whether this machine can train, and what to do where it cannot."""
