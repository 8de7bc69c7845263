"""`python -m sleeptrain`: the console command."""

import sys

from sleeptrain.cli import main

sys.exit(main())
