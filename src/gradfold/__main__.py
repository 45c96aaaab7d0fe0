"""`python -m gradfold`."""

import sys

from gradfold.cli.main import main

sys.exit(main())
