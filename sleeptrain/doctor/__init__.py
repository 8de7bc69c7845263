"""`sleeptrain doctor`: checks that show if this machine can train, and what to do if it cannot."""
