"""The health of a run: what it measures of itself, and what it does about steps and processes that go wrong."""
