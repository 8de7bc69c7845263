"""The health of a run: norms, speeds and checksums, and the treatment of failed steps and processes."""
